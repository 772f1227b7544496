#!/bin/bash
# What there is to measure on a GPU, in one run: bash bench/gpu.sh "python torch_reference.py --compile"
# The rival's command takes the flags of bench/compare.py; the tests need the extra `dev`. By its parts' times some ten
# minutes on an H100. SHAPES (depth:rows, apart by spaces), SEQ, VOCAB, ROUNDS and PYTHON may be set.
set -u
rival=${1:?the command of a rival, in quotes}
python=${PYTHON:-python}
seq=${SEQ:-2048} vocab=${VOCAB:-65536} rounds=${ROUNDS:-3}

echo "== in bfloat16, by cuDNN and kernels of our own, beside float32"
# In float32, products would be TF32's. A small share of the memory: several processes test at a time.
JAXCHAT_TEST_PLATFORM=${PLATFORM:-cuda} JAX_DEFAULT_MATMUL_PRECISION=highest XLA_CLIENT_MEM_FRACTION=0.1 \
    $python -m pytest -q -n 4 tests/test_gpu.py tests/test_kernels.py

for shape in ${SHAPES:-20:16 12:32}; do
    flags="--depth=${shape%:*} --seq=$seq --batch=${shape#*:} --vocab=$vocab"
    echo "== the step beside the rival's, in turn: $flags"
    $python -m bench.compare "$rival" $flags --rounds="$rounds"
    echo "== where its time goes"
    $python -m bench.profile $flags --steps=3
    echo "== decoding"
    $python -m bench.decode --depth="${shape%:*}" --seq="$seq" --vocab="$vocab" --batches="${BATCHES:-1,16,64,128}"
done

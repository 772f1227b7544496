"""The six chat tasks: letters and answers against a plain float64 model, their checks, models that know all or none."""

import math
import textwrap

import jax
import numpy as np
import pytest
from conftest import model_on, random_params, sandbox_is_whole
from plain_scorer import PlainModel

from jaxchat import sharding
from jaxchat.config import Compute, ModelConfig, UserError
from jaxchat.data.tasks import load_task
from jaxchat.data.tasks.answers import final_number
from jaxchat.eval import chat, scoring
from jaxchat.eval.results import mean
from jaxchat.eval.scoring import Scorer
from jaxchat.infer.calculator import calculate
from jaxchat.infer.engine import Engine, Generation
from jaxchat.model import params as model_params
from jaxchat.tokenizer import SPECIAL_TOKENS, Tokenizer

LENGTH = 96
CHOICES = ["ARC-Easy", "ARC-Challenge", "MMLU"]
NEEDS_SANDBOX = pytest.mark.skipif(not sandbox_is_whole(), reason="this kernel has no Landlock or no seccomp")


@pytest.fixture(scope="module")
def rows(shared_data):
    """200 problems of each task, 12 of HumanEval's."""
    return {
        name: chat.drawn(load_task(task.spec, shared_data), 12 if name == "HumanEval" else 200)
        for name, task in chat.TASKS.items()
    }


@pytest.fixture(scope="module")
def tokenizer(rows):
    return Tokenizer.train((row["messages"][0]["content"] + "\n#### " for row in rows["GSM8K"]), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(LENGTH, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
    return random_params(config, seed=2, scale=0.3), config


@pytest.fixture(scope="module")
def mesh(devices):
    return sharding.make_mesh(devices[:1])


def test_letters_are_the_plain_models(rows, tokenizer, model, mesh):
    """Item by item; a problem whose best two letters are within float32's reach of one another may go either way."""
    scorer, plain = Scorer(model[0], model_on(mesh, model[1]), quiet=True), PlainModel(*model)
    for name in CHOICES:
        got = chat.choose_letters(scorer, tokenizer, rows[name])
        assert len(got) == 200 and 0 < sum(got) < 200
        for row, right in zip(rows[name], got, strict=True):
            messages = row["messages"]
            text = [tokenizer.special("<|user_start|>"), *tokenizer.encode(messages[0]["content"])]
            ends = [tokenizer.special("<|user_end|>"), tokenizer.special("<|assistant_start|>")]
            prompt = [tokenizer.bos, *text, *ends][-LENGTH:]
            logits = plain.logits(prompt, len(prompt) - 1)[0][
                [tokenizer.ranks[letter.encode()] for letter in row["letters"]]
            ]
            best = row["letters"][int(np.argmax(logits))]
            near = np.sort(logits)[-1] - np.sort(logits)[-2] < 1e-4
            assert near or right == (best == messages[1]["content"])


@pytest.fixture(scope="module")
def talkative(tokenizer):
    """A model that tends to go on as chat models do: it calls the tool, states numbers and ends, each where the problem
    makes it, for its attention outweighs that tendency."""
    config = ModelConfig(LENGTH, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    params = random_params(config, seed=3, scale=0.12)
    start, end, call, called, _, told = (tokenizer.special(name) for name in SPECIAL_TOKENS[3:])
    marks, space, *digits = (tokenizer.ranks[piece] for piece in (b"####", b" ", *(b"%d" % i for i in range(10))))
    pairs = [(start, call), (start, marks), (told, marks), (marks, space)]
    pairs += [pair for digit in digits for pair in ((call, digit), (space, digit), (digit, called), (digit, end))]
    head_DV, table_VD = np.array(params.lm_head), np.asarray(params.wte)
    for token, after in pairs:
        head_DV[:, after] += 1.5 * table_VD[token]
    return params.replace(lm_head=head_DV, blocks=params.blocks.replace(wo=6 * params.blocks.wo)), config


class Remembers(Engine):
    """An engine that keeps what it generated last, in .answers."""

    def generate(self, *args, **options):
        self.answers = super().generate(*args, **options)
        return self.answers


def is_plain(plain, tokenizer, prompt, said, max_tokens):
    """(whether the plain model's likeliest tokens are an answer's, by how much they led at least), in one pass over the
    answer: what is likeliest at a place depends only on the tokens before it, which have been found the same."""
    special, forced, lead = tokenizer.special, [], math.inf
    logits_TV = plain.logits([*prompt, *said], len(prompt) - 1)
    for at in range(max_tokens):
        if forced:
            token = forced.pop(0)
        else:
            lead = min(lead, np.ptp(np.sort(logits_TV[at])[-2:]))
            token = int(logits_TV[at].argmax())
            if token in (special("<|assistant_end|>"), tokenizer.bos):
                return at == len(said), lead
        if at == len(said) or token != said[at]:
            return False, lead
        if token != special("<|python_end|>"):
            continue
        _, opened, expression = tokenizer.decode(said[:at]).rpartition("<|python_start|>")
        if opened and (value := calculate(expression)) is not None:
            forced = [special("<|output_start|>"), *tokenizer.encode(value), special("<|output_end|>")]
    return len(said) == max_tokens, lead


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [("GSM8K", 200), ("SpellingBee", 200), ("HumanEval", 164)])
def test_written_answers_are_the_plain_models(shared_data, tokenizer, talkative, name, number):
    """Item by item, the text and whether it is right; one may differ that has a token whose lead is within float32's
    reach. So that a model that knows nothing is right at times, a digit is the answer, or any program that runs."""
    if name == "HumanEval" and not sandbox_is_whole():
        pytest.skip("this kernel has no Landlock or no seccomp")
    task, plain, max_tokens, checked = chat.TASKS[name], PlainModel(*talkative), 16, {}
    rows = chat.drawn(load_task(task.spec, shared_data), 200)
    for i, row in enumerate(rows):
        said = [row["messages"][0], {"role": "assistant", "content": f"#### {i % 10}"}]
        rows[i] = row | {"number": i, "messages": said, "test": "def check(_): pass"}

    def check(row, text):
        checked[row["number"]] = text, task.check(row, text)
        return checked[row["number"]][1]

    engine = Remembers(*talkative, tokenizer, Compute(), batch_size=64)
    right = chat.write_answers(engine, rows, check, quiet=True, max_tokens=max_tokens, temperature=0.0)
    assert len(rows) == len(right) == number
    close = ended = 0
    for i, (row, answer) in enumerate(zip(rows, engine.answers, strict=True)):
        prompt = tokenizer.render_for_completion(row)[-(LENGTH - max_tokens) :]
        same, lead = is_plain(plain, tokenizer, prompt, answer.tokens, max_tokens)
        close, ended = close + (lead < 1e-4), ended + answer.finished
        assert same or lead < 1e-4
        assert checked[i][0] == tokenizer.decode(answer.tokens) and right[i] == [checked[i][1]]
    called = sum("<|python_end|><|output_start|>" in text for text, _ in checked.values())
    assert close < 5 and 20 < ended < number - 20 and called > 5 and 3 < sum(map(sum, right)) < number - 20


class Knows:
    """A scorer and an engine that know every answer of the given rows."""

    def __init__(self, tokenizer, rows):
        self.tokenizer, self.config, self.rows = tokenizer, ModelConfig(2048), rows

    def choose(self, prompts, candidates):
        return [row["letters"].index(row["messages"][1]["content"]) for row in self.rows]

    def generate(self, prompts, **how):
        texts = []
        for row in self.rows:
            content = row["messages"][1]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            texts += [Generation(self.tokenizer.encode(text))] * how.get("num_samples", 1)
        return texts


def evaluated(rows, scorer, engine, tokenizer, **how):
    found = []
    for name, task in chat.TASKS.items():
        if task.check:
            right = chat.write_answers(engine(name), rows[name], task.check, **how)
        else:
            right = [[one] for one in chat.choose_letters(scorer(name), tokenizer, rows[name])]
        found.append(chat.result_of(name, right))
    return found


@NEEDS_SANDBOX
def test_a_model_that_knows_all_scores_exactly_1(rows, tokenizer):
    def knowing(name):
        return Knows(tokenizer, rows[name])

    results = evaluated(rows, knowing, knowing, tokenizer, max_tokens=9)
    assert mean(results) == 1.0 and [result.accuracy for result in results] == [1.0] * 6
    assert [result.items for result in results] == [200, 200, 200, 200, 12, 200]


@pytest.mark.slow
def test_an_untrained_model_scores_about_0(rows, tokenizer, mesh):
    """It takes the first letter, right with probability 1/4: of 200 problems a share with the standard deviation
    √(¼·¾/200), over ¾ when centred; of three tasks among ChatCORE's six √3/6 of that. It writes nothing right."""
    config = ModelConfig(64, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    params = model_params.init(jax.random.key(0), config)
    scorer, engine = Scorer(params, model_on(mesh, config), quiet=True), Engine(params, config, tokenizer, Compute())
    results = evaluated(rows, lambda _: scorer, lambda _: engine, tokenizer, max_tokens=4, temperature=0.0)
    assert [result.accuracy for result in results[3:]] == [0.0] * 3
    assert results[0].right == [[row["messages"][1]["content"] == "A"] for row in rows["ARC-Easy"]]
    assert abs(mean(results)) < 3 * math.sqrt(3) / 6 * math.sqrt(0.25 * 0.75 / 200) / 0.75


@pytest.mark.parametrize("limit, most, kept", [(256, 512, 128), (1024, 512, 512), (1024, 100, 924)])
def test_long_problems_keep_their_end(rows, tokenizer, limit, most, kept):
    """Half of the context at least is the problem's, however long an answer may be."""
    asked = []

    class Deaf:
        config = ModelConfig(limit, tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)

        def generate(self, prompts, **how):
            asked.extend(prompts)
            return [Generation() for _ in prompts]

    Deaf.tokenizer = tokenizer
    row = {"messages": [{"role": "user", "content": "why? " * 999}, {"role": "assistant", "content": "#### 1"}]}
    assert chat.write_answers(Deaf(), [row], chat.states_the_number, quiet=True, max_tokens=most) == [[False]]
    assert asked == [tokenizer.render_for_completion(row)[-kept:]]


def test_checks_of_numbers(rows):
    """Numbers are compared as numbers; of several after #### the first counts."""
    row = rows["GSM8K"][0]
    answer = final_number("".join(part["text"] for part in row["messages"][1]["content"]))
    for text, right in [
        (f"so\n#### {answer}", True), (f"#### {answer}.", True), (f"#### {answer}0", False), (f"{answer}", False),
        (f"#### {answer} #### 7", True), ("####", False), ("", False), (f"####{answer}", True),
        (f"#### ${answer}.00", True), (f"#### **{answer}** apples", True), (f"#### -{answer}", False),
        (f"### {answer}", False), (f"#### Sum\n1 + 1\n#### {answer}", True), (f"#### {answer}.5", False),
    ]:  # fmt: skip
        assert chat.states_the_number(row, text) is right, text


@pytest.mark.parametrize(
    "text, number",
    [
        ("18.00", 18), ("$18", 18), ("1,234", 1234), ("-1,234.50 and", -1234.5), ("-$5", -5), ("$-5", -5), ("−5", -5),
        ("–5", -5), ("+7", 7), (".5", 0.5), ("1,234,567", 1234567), ("007", 7), ("1" * 40, int("1" * 40)),
        ("€ 20%", 20), (r"\boxed{18}", 18), (r"$\boxed{\$18}$", 18), (r"\(-18\)", -18), ("1e3", 1000), ("5E-1", 0.5),
        ("(18)", 18), ("[18]", 18), ("`18`", 18), ("“18”", 18), ("₹18", 18), ("¥1,00,000", 100_000), ("_18_", 18),
        ("**18**", 18), ("**-18**", -18), ("18 dollars", 18), ("18kg", 18), ("$1,000.00", 1000), ("18/1", 18),
        ("3 / 4 cup", 0.75), ("-1/2", -0.5), ("18/day", 18), ("5%", 5), ("18.", 18), ("18!\n1 2 3", 18), ("\n18", 18),
        ("18 m²", 18), ("18\u00a0€", 18),
        # not one number, or words before it
        ("x", None), ("$", None), ("1,23", None), ("12,3456", None), ("1.234,56", None), ("1 000", None),
        ("3 + 4 = 7", None), ("3*6", None), ("18-5", None), ("18 or 19", None), ("17 18 19", None), ("18/0", None),
        ("1/2/3", None), ("1 1/2", None), ("10:30", None), ("2^3", None), ("1e999", None), ("--5", None),
        ("the answer is 18", None), ("x = 18", None), ("= 18", None), ("about 18", None), ("~18", None), ("<18", None),
        ("eighteen", None), ("boxed 18", None), (r"\frac{1}{2}", None), ("18" * 5000, None), ("١٨", None),
    ],
)  # fmt: skip
def test_final_numbers(text, number):
    with_space, without = final_number(f"#### {text}"), final_number(f"so ####{text}")
    assert with_space == without == number


@pytest.mark.parametrize(
    "info",
    [
        "python",
        "py",
        "python3",
        "Python",
        "PY",
        " python",
        "python3.11",
        "{.python}",
        "",
        'python title="a.py"',
        "py\r",
    ],
)
@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
def test_fences_of_code(fence, info):
    """Whatever is written after the fence, the code in it is what runs, not what follows it."""
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f): assert f(1) == 2"}
    code = "def f(x):\n    return x + 1\n"
    text = f"Run: {fence}{info}\n{code}{fence}\nThis adds 1 to x.\n{fence}python\nf(2)\n{fence}\n"
    assert chat.code_of(row, text) == code
    assert chat.program_of(row, text) == f"{row['prompt']}\n{code}\n\n{row['test']}\n\ncheck(f)\n"


def test_which_code_runs():
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": ""}
    code = "def f(x):\n    return x + 1\n"
    assert chat.code_of(row, f"```bash\npip install x\n```\n```python\n{code}```") == code  # not the first block
    assert chat.code_of(row, f"```js\n{code}```") == code  # no block of Python: the first
    assert chat.code_of(row, f"```python\nf(1)\n```\nwith\n```python\n{code}```") == code
    assert chat.code_of(row, "```python\n1\n```\n```python\n2\n```") == "1\n"
    indented = code.replace("def", "   def").replace("    return", "       return")
    assert chat.code_of(row, f"1. Do so:\n   ```python\n{indented}   ```") == code  # in a list
    deeper = textwrap.indent(f"```python\n{code}```", "     ")
    assert chat.code_of(row, f"1. In a list:\n   - of lists:\n{deeper}\n") == code
    example = code.replace("    return", '    """As in:\n    ```\n    f(1)\n    ```\n    """\n    return')
    assert chat.code_of(row, f"```python\n{example}```\nIt adds.") == example  # a fence in a docstring ends nothing
    assert chat.code_of(row, "```python\n    return x + 1\n```") == "    return x + 1\n"  # the body alone
    assert chat.code_of(row, f"```python\n{code}") == code and chat.code_of(row, code) == code  # cut off; no fence
    assert chat.code_of(row, "the call ```f(1)``` is 2") == "the call ```f(1)``` is 2"


@NEEDS_SANDBOX
def test_programs_of_answers(rows):
    """The whole function, in a fence or not, with or without imports, or only its body; and a wrong one."""
    row = rows["HumanEval"][0]
    whole = row["messages"][1]["content"]
    body = row["canonical_solution"]
    function = whole[whole.index("def ") :]
    for text in (whole, body, function, f"Here:\n```python\n{function}```\nDone.", f"```\n{whole}"):
        assert chat.passes_its_tests(row, text)
    helped = next(row for row in rows["HumanEval"] if row["entry_point"] == "make_palindrome")
    whole = helped["messages"][1]["content"]  # its prompt has a function besides, which the answer calls
    assert chat.passes_its_tests(helped, f"```python\n{whole[whole.index('def make_palindrome') :]}```")
    wrong = f"```python\ndef {row['entry_point']}(*_): return object()\n```"
    for text in ("", "    pass", wrong, "```python\n```", "no code"):
        assert not chat.passes_its_tests(row, text)


def test_chat_core_says_of_which_tasks_it_is():
    """With SpellingBee and, as nanochat's figures are, without it."""
    results = [chat.result_of(name, [[i < n] for i in range(10)]) for n, name in enumerate(chat.TASKS, 3)]
    centred = [result.centered for result in results]
    assert chat.chat_core(results) == {
        "ChatCORE": pytest.approx(np.mean(centred)),
        "ChatCORE without SpellingBee": pytest.approx(np.mean(centred[:5])),
    }
    few = [result for result in results if result.task != "HumanEval"]
    assert chat.chat_core(few) == {
        "ChatCORE without HumanEval": pytest.approx(np.mean(centred[:4] + centred[5:])),
        "ChatCORE without HumanEval, SpellingBee": pytest.approx(np.mean(centred[:4])),
    }


@pytest.mark.parametrize(
    "gigabytes, dtype, slots",
    [(80, "bfloat16", 64), (16, "bfloat16", 16), (5, "bfloat16", 2), (3, "bfloat16", 1), (16, "float32", 8)],
)
def test_slots_by_memory(gigabytes, dtype, slots):
    """d20: 561M parameters, and 2·20·2048·1280 keys and values a slot, 210 MB in bfloat16; twice that is counted."""
    d20 = ModelConfig.from_depth(20, sequence_len=2048, vocab_size=65536)
    assert chat.batch_size_for(d20, Compute(dtype=dtype), gigabytes * 10**9) == slots
    assert chat.batch_size_for(d20, Compute(dtype=dtype), None) == 64


def test_full_memory_names_the_flag():
    with pytest.raises(UserError, match="memory is full; lower -b"), scoring.out_of_memory("lower -b"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 13 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), scoring.out_of_memory("lower -b"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_pass_at_k():
    """Against counting all draws."""
    right = [[True, False, False, False], [False] * 4, [True, True, True, False], [True] * 4]
    assert chat.pass_at(1, right) == pytest.approx((0.25 + 0 + 0.75 + 1) / 4)
    assert chat.pass_at(2, right) == pytest.approx((3 / 6 + 0 + 1 + 1) / 4)
    assert chat.pass_at(4, right) == 0.75
    assert chat.result_of("GSM8K", right).accuracy == chat.pass_at(1, right)

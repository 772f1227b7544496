"""Convert tokenizers from and to the formats of nanochat and Hugging Face, and define the chat template."""

import json
import pickle
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxchat import files
from jaxchat.config import UserError
from jaxchat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, byte_characters

# A chat template makes one string of a conversation, in which the spelling of a special token is encoded as
# that token. In messages it must stay text: the template puts MARK after the "<" of "<|", and the normalizer,
# which does not see special tokens, removes it. BREAK separates two parts of text, so that no token spans
# both; the pre-tokenizer splits there and drops it. Both are noncharacters, which Unicode reserves for
# internal use of programs: they are removed from texts that contain them.
MARK, BREAK = "\ufdd0", "\ufdd1"
OLD_NORMALIZER = {"type": "Replace", "pattern": {"String": f"<{MARK}|"}, "content": "<|"}  # in older exports

# {% generation %} encloses what the assistant learns to say. Where possible, such a block ends with a special
# token: if it ended with a character of several tokens, transformers would mask all but the first of them.
CHAT_TEMPLATE = """\
{%- macro say(text) -%}
  {%- if text is not string -%}{{- raise_exception('what is said must be text') -}}{%- endif -%}
  {{- text | replace('<|', '<MARK|') -}}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- if not turns -%}{{- raise_exception("a user's message must follow the system message") -}}{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('user and assistant must alternate, after at most one system message') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- '<|user_start|>' -}}
    {%- if loop.first and messages[0]['role'] == 'system' -%}
      {{- say(messages[0]['content'] + '\\n\\n' + message['content']) -}}
    {%- else -%}{{- say(message['content']) -}}{%- endif -%}
    {{- '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- set content = message['content'] -%}
    {%- set learnt = namespace(text='') -%}
    {%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}
      {%- if part['type'] == 'text' -%}
        {%- set follows = learnt.text and part['text'] and loop.previtem['type'] == 'text' -%}
        {%- set learnt.text = learnt.text + ('BREAK' if follows else '') + say(part['text']) -%}
      {%- elif part['type'] == 'python' -%}
        {%- set learnt.text = learnt.text + '<|python_start|>' + say(part['text']) + '<|python_end|>' -%}
      {%- elif part['type'] == 'python_output' -%}
        {%- if learnt.text -%}{%- generation -%}{{- learnt.text -}}{%- endgeneration -%}{%- endif -%}
        {%- set learnt.text = '' -%}
        {{- '<|output_start|>' + say(part['text']) + '<|output_end|>' -}}
      {%- else -%}{{- raise_exception('unknown part: ' + part['type']) -}}{%- endif -%}
    {%- endfor -%}
    {%- generation -%}{{- learnt.text + '<|assistant_end|>' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
""".replace("MARK", MARK).replace("BREAK", BREAK)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens whose concatenation is a token, ordered by the rank of the concatenation."""
    return [
        (piece[:i], piece[i:])
        for piece in sorted(ranks, key=ranks.get)
        for i in range(1, len(piece))
        if piece[:i] in ranks and piece[i:] in ranks
    ]


def to_hugging_face(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert a tokenizer to the class of the tokenizers library.

    By default, the result encodes names of special tokens in a text, such as "<|bos|>", as those tokens.
    """
    characters = byte_characters()

    def text(piece: bytes) -> str:
        return "".join(characters[b] for b in piece)

    vocab = {text(piece): rank for piece, rank in tokenizer.ranks.items()}
    pairs = [(text(a), text(b)) for a, b in merges(tokenizer.ranks)]
    # ignore_merges: a word in the vocabulary is one token even if no merges lead to it, as in tiktoken.
    result = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    result.normalizer = normalizers.Replace(MARK, "")
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(BREAK, "removed"), split, to_bytes])
    result.decoder = decoders.ByteLevel()
    specials = [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    result.add_special_tokens(specials)
    return result


def end_token(chat: bool) -> str:
    """Return the end-of-sequence and padding token: <|assistant_end|> for a chat model, else <|bos|>."""
    # transformers masks padding tokens in prompts, which must not hide <|bos|> from a chat model.
    return "<|assistant_end|>" if chat else "<|bos|>"


def save_hugging_face(tokenizer: Tokenizer, folder: Path, sequence_len: int, chat: bool):
    """Write tokenizer.json and tokenizer_config.json to `folder`, with a chat template if `chat`."""
    to_hugging_face(tokenizer).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": end_token(chat),
        "pad_token": end_token(chat),
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "model_max_length": sequence_len,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    files.write_json(folder / "tokenizer_config.json", config)


def from_hugging_face(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raise UserError if it is damaged or encodes text unlike jaxchat."""
    try:
        tokenizers.Tokenizer.from_file(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        byte_of = {character: byte for byte, character in byte_characters().items()}

        def piece(text: str) -> bytes:
            return bytes(byte_of[c] for c in text)

        ranks = {piece(text): rank for text, rank in model["vocab"].items() if text not in specials}
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [piece(a + b) for a, b in pairs]
    except Exception as problem:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{path} is not a readable byte-level BPE tokenizer ({problem!r})") from problem
    tokenizer = _tokenizer(path, ranks, specials)
    ours = json.loads(to_hugging_face(tokenizer).to_str())
    odd_flags = ("lstrip", "rstrip", "single_word")
    wrong = {
        "normalizer": content.get("normalizer") not in (None, ours["normalizer"], OLD_NORMALIZER),
        "pre_tokenizer": _steps(content) not in (_steps(ours), _steps(ours)[1:]),  # with or without our BREAK
        "dropout": model.get("dropout"),
        "continuing_subword_prefix": model.get("continuing_subword_prefix"),
        "end_of_word_suffix": model.get("end_of_word_suffix"),
        "added_tokens": any(token.get(flag) for token in content["added_tokens"] for flag in odd_flags),
        # As in tiktoken, merges must produce every token of several bytes, in the order of ids.
        "merges": {p for p in ranks if len(p) > 1} != set(made)
        or [ranks[p] for p in made] != sorted(map(ranks.get, made)),
    }
    if any(wrong.values()):
        names = ", ".join(name for name, is_wrong in wrong.items() if is_wrong)
        raise UserError(f"{path} tokenizes unlike jaxchat ({names}); move it away to convert without it")
    return tokenizer


def _steps(content: dict) -> list[dict]:
    """Return the steps of a tokenizer.json's pre-tokenizer, without options that only affect text offsets."""
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]


def _tokenizer(path: Path, ranks: dict[bytes, int], specials: dict[str, int]) -> Tokenizer:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: the ids of its {len(ranks):,} pieces are not 0 to {len(ranks) - 1:,}")
    if missing := [bytes([b]) for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"{path} has no token for the byte {missing[0]!r}; jaxchat needs all 256")
    wanted = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if specials != wanted:
        odd = sorted(dict(specials.items() ^ wanted.items()))[0]
        where = f"is {specials[odd]}" if odd in specials else "is missing"
        raise UserError(f"{path}: special token {odd} {where}; jaxchat needs nine, from id {len(ranks):,} on")
    return Tokenizer(ranks)


class _PickledState:
    """Replacement for tiktoken's Encoding during unpickling. It only keeps the pickled state."""

    def __setstate__(self, state):
        self.state = state


class _OnlyEncodings(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in (("tiktoken.core", "Encoding"), ("tiktoken", "Encoding")):
            return _PickledState
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> Tokenizer:
    """Read nanochat's tokenizer.pkl without running code in it. Raise UserError if it is not usable."""
    try:
        with path.open("rb") as file:
            state = getattr(_OnlyEncodings(file).load(), "state", None)
    except OSError:
        raise
    except Exception as problem:  # a damaged pickle raises almost anything
        only = "a tokenizer.pkl may hold only a tiktoken Encoding"
        raise UserError(f"{path} is refused: {problem}; {only}") from problem
    if not isinstance(state, dict):
        raise UserError(f"{path} is refused: it does not hold a custom tiktoken Encoding")
    ranks, specials = state.get("mergeable_ranks"), state.get("special_tokens")
    well_formed = isinstance(ranks, dict) and isinstance(specials, dict)
    kinds = ((ranks, bytes), (specials, str))
    if not well_formed or not all(
        type(k) is kind and type(v) is int for d, kind in kinds for k, v in d.items()
    ):
        raise UserError(f"{path} is refused: its ranks or specials are not names and numbers")
    if state.get("pat_str") != SPLIT_PATTERN:
        pattern = str(state.get("pat_str"))[:60]
        raise UserError(f"{path} splits text by a different pattern than jaxchat: {pattern!r}")
    return _tokenizer(path, ranks, specials)


def write_pickle(tokenizer: Tokenizer, path: Path):
    """Write a tokenizer as nanochat's tokenizer.pkl, a pickled tiktoken Encoding."""
    specials = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens=specials
    )
    with path.open("wb") as file:
        pickle.dump(encoding, file)

"""A byte-level BPE tokenizer, trained by the tokenizers library and run by tiktoken, and the chat format."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jaxchat import files
from jaxchat.config import UserError, base_dir

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# GPT-4's pattern for splitting text before BPE, but with digits in groups of at most two.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"  # contractions, words, numbers
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"  # punctuation, space
)


class Piece(NamedTuple):
    """A special token of a conversation, or the text between two special tokens."""

    text: str
    special: bool
    learn: int  # 1: supervised, so the assistant learns to say it; 0: not


BOS = Piece("<|bos|>", True, 0)
USER_START, USER_END = Piece("<|user_start|>", True, 0), Piece("<|user_end|>", True, 0)
ASSISTANT_START, ASSISTANT_END = Piece("<|assistant_start|>", True, 0), Piece("<|assistant_end|>", True, 1)
# The parts of an assistant's message: the pieces around each, and whether the assistant learns to say it.
PARTS = {
    "text": ((), (), 1),
    "python": ((Piece("<|python_start|>", True, 1),), (Piece("<|python_end|>", True, 1),), 1),
    "python_output": ((Piece("<|output_start|>", True, 0),), (Piece("<|output_end|>", True, 0),), 0),
}
PART_TYPES = tuple(PARTS)


def chat_pieces(conversation: dict) -> list[Piece]:
    """Convert a conversation to special tokens and texts, in order. Raise UserError if it is malformed."""
    pieces = [BOS]
    for message in _user_first(conversation):
        content = message["content"]
        if message["role"] == "user":
            pieces += [USER_START, Piece(content, False, 0), USER_END]
            continue
        pieces.append(ASSISTANT_START)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            before, after, learn = PARTS[part["type"]]
            pieces += [*before, Piece(part["text"], False, learn), *after]
        pieces.append(ASSISTANT_END)
    return pieces


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """A byte-level BPE tokenizer. The learnt tokens have the first ids, the nine special tokens the last."""

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks  # {bytes of a learnt token: its id}
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self._specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "jaxchat", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self._specials
        )
        self.bos = self.special("<|bos|>")
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, rank in ranks.items():
            lengths[rank] = len(piece)
        self.token_bytes = lengths  # int32 [V]: number of bytes of each token; 0 for special tokens
        digest = hashlib.sha256("\n".join((SPLIT_PATTERN, *SPECIAL_TOKENS)).encode())
        digest.update(b"".join(base64.b64encode(piece) + b"\n" for piece in sorted(ranks, key=ranks.get)))
        self.hash = digest.hexdigest()
        # {shard: fingerprint of its content} of the training text; {}: not recorded. Not part of the hash.
        self.trained_on: dict[str, str] = {}
        self.training_seconds = 0.0

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """Train a tokenizer with exactly vocab_size tokens. Raise UserError if that is impossible."""
        specials = len(SPECIAL_TOKENS)
        wanted = vocab_size - specials
        if wanted < 256:
            smallest = f"{256 + specials}: 256 bytes and {specials} specials"
            raise UserError(f"--vocab_size={vocab_size} is below the minimum of {smallest}")
        bpe = tokenizers.Tokenizer(models.BPE())
        pattern = SPLIT_PATTERN.replace("?+", "?").replace("++", "+")
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=wanted, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator((without_surrogates(text) for text in texts), trainer)
        byte_of = {c: b for b, c in byte_characters().items()}
        ranks = {bytes(byte_of[c] for c in piece): rank for piece, rank in bpe.get_vocab().items()}
        if len(ranks) < wanted:
            raise UserError(
                f"the text gives only {len(ranks)} different tokens, but --vocab_size={vocab_size} needs "
                f"{wanted}; give more text, or at most --vocab_size={len(ranks) + specials}"
            )
        # tiktoken merges by rank, and bytes need ranks too; the trainer gives them the first 256.
        return cls(ranks)

    @classmethod
    def load(cls, directory: Path | None = None) -> "Tokenizer":
        shared = base_dir() / "tokenizer"
        folder, remedy = Path(directory or shared), "train it again: python -m launch.tok_train"
        if folder != shared:  # the copy beside a run's checkpoints
            remedy = f"delete this folder to use the tokenizer in {shared}, if it is the same"
        if not (folder / "ranks.txt").is_file():
            raise UserError(f"no tokenizer in {folder}; train one with: python -m launch.tok_train")
        try:
            lines = (folder / "ranks.txt").read_text(encoding="ascii").split("\n")
            tokenizer = cls({base64.b64decode(line): rank for rank, line in enumerate(lines) if line})
            # A save that was killed between its two renames leaves the second file under its temporary name.
            paths = [folder / "tokenizer.json", folder / f"tokenizer.json{files.PART}"]
            infos = [files.read_json(path) for path in paths]
        except (OSError, ValueError) as problem:
            raise UserError(f"the tokenizer in {folder} cannot be read ({problem}); {remedy}") from problem
        info = next((info for info in infos if info.get("hash") == tokenizer.hash), None)
        if info is None:
            raise UserError(f"the tokenizer in {folder} is damaged: its ranks don't match its hash; {remedy}")
        tokenizer.trained_on = info.get("trained_on", {})
        tokenizer.training_seconds = info.get("training_seconds", 0.0)
        return tokenizer

    def knows(self, fingerprint: dict[str, str]) -> bool:
        """Return whether the training text had any shard of {name: fingerprint}; True if this is unknown."""
        return not self.trained_on or not set(self.trained_on.values()).isdisjoint(fingerprint.values())

    def save(self, directory: Path | None = None) -> Path:
        """Write the tokenizer to a folder, by default <base directory>/tokenizer, and return the folder."""
        folder = Path(directory or base_dir() / "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        pieces = sorted(self.ranks, key=self.ranks.get)
        text = "".join(base64.b64encode(piece).decode() + "\n" for piece in pieces)
        info = {"hash": self.hash, "vocab_size": self.vocab_size, "pattern": SPLIT_PATTERN}
        info |= {"specials": self._specials, "trained_on": self.trained_on}
        info |= {"training_seconds": self.training_seconds}
        with files.atomic(folder / "tokenizer.json") as about, files.atomic(folder / "ranks.txt") as ranks:
            ranks.write_text(text, encoding="ascii")
            about.write_text(json.dumps(info, indent=1), encoding="utf-8")
        return folder

    def special(self, name: str) -> int:
        return self._specials[name]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Names of special tokens in it are encoded as plain text."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, *, specials: bool = False) -> np.ndarray:
        """Return int32 token ids of a text. specials: encode names such as "<|bos|>" as special tokens."""
        allowed = self._specials.keys() if specials else frozenset()
        try:
            ids = self._encoding.encode_to_numpy(text, allowed_special=set(allowed), disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_array(without_surrogates(text), specials=specials)
        except ValueError:  # too long for tiktoken's regular expressions, such as a million spaces in a row
            if len(text) < 1000:
                raise
            halves = text[: len(text) // 2], text[len(text) // 2 :]
            return np.concatenate([self.encode_array(half, specials=specials) for half in halves])
        return ids.view(np.int32)

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        """Return the bytes of a sequence of token ids. Ids outside the vocabulary are skipped."""
        return self._encoding.decode_bytes([i for i in ids if i < self.vocab_size])

    def render_conversation(self, conversation: dict) -> tuple[list[int], list[int]]:
        """Return (token ids, mask) of a conversation. The mask is 1 for tokens to train on, else 0."""
        return self._render(chat_pieces(conversation))

    def _render(self, pieces: Iterable[Piece]) -> tuple[list[int], list[int]]:
        ids, mask = [], []
        for piece in pieces:
            tokens = [self.special(piece.text)] if piece.special else self.encode(piece.text)
            ids += tokens
            mask += [piece.learn] * len(tokens)
        return ids, mask

    def render_all(self, conversations: list[list[Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return int32 arrays (token ids, mask) of each conversation, given as the result of `chat_pieces`.

        The mask is 1 for tokens to train on, else 0.
        """
        alone = [_may_merge(pieces) for pieces in conversations]
        joined = [
            piece for pieces, apart in zip(conversations, alone, strict=True) if not apart for piece in pieces
        ]
        ids = self.encode_array("".join(piece.text for piece in joined), specials=True)
        is_special = ids >= self.bos  # the first special id
        learn_special, learn_after = [], []  # `learn` of each special token, and of the text after it
        for _, special, learn in joined:
            if special:
                learn_special.append(learn)
                learn_after.append(0)
            else:
                learn_after[-1] = learn
        if is_special.sum() != len(learn_special):  # a text encoded in halves was cut inside a special token
            return [_arrays(self._render(pieces)) for pieces in conversations]
        which = np.cumsum(is_special) - 1
        mask = np.where(is_special, np.int32(learn_special)[which], np.int32(learn_after)[which])
        starts = np.flatnonzero(ids == self.bos)[1:]
        together = zip(np.split(ids, starts), np.split(mask, starts), strict=True)
        return [
            _arrays(self._render(pieces)) if apart else next(together)
            for pieces, apart in zip(conversations, alone, strict=True)
        ]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Return the token ids of a conversation without a final answer, followed by <|assistant_start|>."""
        messages = conversation["messages"]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({"messages": messages})
        return [*ids, self.special("<|assistant_start|>")]


def _may_merge(pieces: list[Piece]) -> bool:
    """Return whether encoding pieces as one joined text could give other tokens than encoding each alone."""
    after_text = False
    for text, special, _ in pieces:
        if not special and (after_text or "<|" in text):
            return True
        after_text = not special
    return False


def _arrays(rendered: tuple[list[int], list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(rendered[0], np.int32), np.array(rendered[1], np.int32)


def check_conversation(conversation: dict):
    """Raise UserError unless the roles and contents of a conversation's messages are valid.

    Roles: an optional system, then user and assistant in turn. Content: text or, for the assistant, a list of
    parts whose types are in PART_TYPES.
    """
    messages = conversation.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError("a conversation has no messages; it needs at least one user message")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message {i} has unknown role {role!r}; it is system (first), user or assistant")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise UserError("a conversation has only a system message; a user message must follow")
    for i, message in enumerate(turns):
        role, content = message["role"], message.get("content")
        due = ("user", "assistant")[i % 2]
        if role != due:
            raise UserError(f"turn {i} is the {role}'s; user and assistant alternate: it must be the {due}'s")
        if isinstance(content, str):
            continue
        if role == "user" or not isinstance(content, list):
            raise UserError(f"turn {i} ({role}) has content {type(content).__name__}; it must be text")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind not in PART_TYPES:
                raise UserError(
                    f"turn {i} has a part of unknown type {kind!r}; it is one of {', '.join(PART_TYPES)}"
                )
            if not isinstance(part.get("text"), str):
                raise UserError(f"turn {i} has a part of type {kind!r} without a `text` that is a string")
    if messages[0]["role"] == "system" and not isinstance(messages[0].get("content"), str):
        raise UserError("the system message's content must be text")


def _user_first(conversation: dict) -> list[dict]:
    """Check a conversation and return its messages, joining a system message to the first user message."""
    check_conversation(conversation)
    messages = conversation["messages"]
    if messages[0]["role"] != "system":
        return messages
    joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
    return [{"role": "user", "content": joined}, *messages[2:]]


def byte_characters() -> dict[int, str]:
    """Return {byte: the character that stands for it in byte-level BPE}."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = sorted(range(256), key=lambda byte: (chr(byte) not in alphabet, byte))
    return dict(zip(ordered, alphabet, strict=True))

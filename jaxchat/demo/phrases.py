"""How users ask for sums, spelling, letters and definitions, and what they greet with. `persona.py` has who-are-yous.

Every set of phrasings has a part that no conversation ever uses: it is kept for scoring, so that a right answer
there is to a question put in words that the model has not seen. {e} is an expression, {a} and {b} numbers, {w} a word,
{c} a letter, {x} a name, {t} a thing.
"""

from typing import NamedTuple

from jaxchat.demo.chance import Chance


class Phrasings(NamedTuple):
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, held_out: bool) -> tuple[str, ...]:
        return self.held_out if held_out else self.train


# What may stand before a question, and after it in place of its mark.
OPENERS = (
    "hi, ", "hello, ", "hey Pip, ", "Pip, ", "please, ", "ok, ", "so, ", "now, ", "a question: ", "next: ", "and ",
    "excuse me, ", "tell me, ", "thanks. ",
)  # fmt: skip
QUESTION_ENDS = ("", "", "??", ", please?", " please?", ", Pip?")
REQUEST_ENDS = ("", "", "!", ", please.", " please", ", Pip.")

SIGNS = {
    "+": ("+", "+", "plus"),
    "-": ("-", "-", "minus"),
    "*": ("*", "*", "x", "times"),
    "/": ("/", "/", "divided by"),
}

# For all four operations: {e} is "23 * 7", "23*7" or "23 times 7".
SUM_FRAMES = Phrasings(
    train=(
        "what is {e}?", "what is {e}?", "what is {e}?", "what's {e}?", "how much is {e}?", "calculate {e}.",
        "compute {e}.", "can you calculate {e}?", "can you compute {e} for me?", "{e}?", "{e} = ?", "{e} =", "{e}",
        "{e} is what?", "{e} is how much?", "tell me {e}.", "tell me what {e} is.", "what does {e} give?",
        "what does {e} make?", "I need {e}.", "I need to know {e}.", "do you know {e}?", "do you know how much {e} is?",
        "could you tell me how much {e} is?", "work out {e}.", "please work out {e} for me.",
        "give me the result of {e}.", "what is the result of {e}?", "what do you get for {e}?", "find {e}.",
        "solve {e}.", "what do I get for {e}?", "{e} equals what?", "what is the answer to {e}?", "how big is {e}?",
        "use your tool: {e}.", "the answer to {e} is what?", "I want the value of {e}.", "help me compute {e}.",
        "which number is {e}?", "{e} is what number?", "what number do I get for {e}?", "what number does {e} make?",
        "say which number {e} gives.", "tell me the value of {e}.", "how large is {e}?",
    ),
    held_out=(
        "what is the value of {e}?", "could you calculate {e} for me?", "I want to know how much {e} is.",
        "what number is {e}?", "please compute {e} now.", "can you tell me what {e} is?", "show me the result of {e}.",
        "what does {e} equal?",
    ),
)  # fmt: skip

# For one operation, in its own words. The tool is called as {a} sign {b}.
SUM_WORDS = {
    "+": Phrasings(
        train=(
            "add {a} and {b}.", "add {a} to {b}.", "what is the sum of {a} and {b}?", "sum up {a} and {b}.",
            "what do you get if you add {a} and {b}?", "{a} and {b} together make what?",
            "how much do {a} and {b} make?",
            "I have {a} apples and get {b} more. how many do I have?",
            "there are {a} birds and {b} more come. how many?",
            "the sum of {a} and {b}?", "put {a} and {b} together.", "the total of {a} and {b} is what?",
        ),
        held_out=("can you add {a} and {b}?", "what is the total of {a} and {b}?",
        "how much are {a} and {b} together?"),
    ),
    "-": Phrasings(
        train=(
            "subtract {b} from {a}.", "take {b} from {a}.", "take {b} away from {a}.",
            "what is the difference of {a} and {b}?", "what remains if you take {b} away from {a}?",
            "I have {a} apples and give away {b}. how many are left?", "if I take {b} from {a}, what is left?",
            "there are {a} birds and {b} fly away. how many are left?", "what do you get if you subtract {b} from {a}?",
            "the difference of {a} and {b}?", "how much is left of {a} without {b}?", "lower {a} by {b}.",
            "{a} without {b} is how much?", "what is left of {a} without {b}?",
            "what do I have if I have {a} without {b}?",
        ),
        held_out=(
            "what is left if you take {b} from {a}?", "can you subtract {b} from {a}?", "how much is {a} without {b}?",
        ),
    ),
    "*": Phrasings(
        train=(
            "multiply {a} by {b}.", "multiply {a} and {b}.", "multiply {a} with {b}.",
            "what is the product of {a} and {b}?",
            "I have {a} boxes of {b} apples. how many apples do I have?", "{a} multiplied by {b} is what?",
            "what do I get if I multiply {a} and {b}?", "the product of {a} and {b}?",
            "how much is {a} multiplied by {b}?",
            "there are {a} bags with {b} eggs each. how many eggs?", "find the product of {a} and {b}.",
        ),
        held_out=(
            "what do you get if you multiply {a} by {b}?", "what is {a} multiplied by {b}?",
            "can you tell me the product of {a} and {b}?",
        ),
    ),
    "/": Phrasings(
        train=(
            "divide {a} by {b}.", "how often does {b} go into {a}?", "what do I get if I divide {a} by {b}?",
            "share {a} apples among {b} children. how many does each get?", "split {a} into {b} equal parts.",
            "{a} shared among {b} is how much?", "what is one of {b} equal parts of {a}?",
            "please divide {a} by {b} for me.", "divide the number {a} by the number {b}.",
            "I cut {a} into {b} equal parts. how big is each?", "how many times does {b} go into {a}?",
            "how many times does {b} fit into {a}?",
        ),
        held_out=(
            "what do you get if you divide {a} by {b}?", "can you divide {a} by {b}?",
            "how often does {b} fit into {a}?",
        ),
    ),
}  # fmt: skip

SPELLING = Phrasings(
    train=(
        "how do you spell {w}?", "how do you spell {w}?", "spell {w}.", "spell the word {w}.", "can you spell {w}?",
        "can you spell the word {w} for me?", "what are the letters of {w}?", "how is {w} spelled?",
        "how is the word {w} written?", "please spell out {w}.", "tell me how to spell {w}.",
        "write {w} letter by letter.",
        "give me the letters of {w}.", "show me the spelling of {w}.", "what is the spelling of {w}?",
        "I want to write {w}. how is it spelled?", "how does one spell {w}?", "list the letters of {w}.",
        "do you know how to spell {w}?", "I can not spell {w}. can you?", "help me spell {w}.",
        "{w}: how is it spelled?",
        "letter by letter, what is {w}?", "say the letters of {w}.", "which letters make up the word {w}?",
        "write out the word {w} in letters.", "spell {w} for me.", "the spelling of {w}?", "how should I spell {w}?",
        "what letters are in the word {w}?", "show me how to write {w}.", "I need to spell {w}.", "spell: {w}",
        "tell me how {w} is written.", "can you tell me how {w} is spelled?", "please write out {w}.",
        "show me how {w} is written.", "show me how to spell the word {w}.", "tell me the spelling of {w}.",
        "tell me which letters {w} has.", "show me the letters of {w}.", "what letters does the word {w} have?",
        "how do people spell {w}?", "give me the spelling of the word {w}.", "show me what {w} looks like in letters.",
        "which letters are in {w}?", "name the letters in the word {w}.", "name all the letters in {w}.",
        "what are all the letters in {w}?", "say each letter in the word {w}.", "list every letter in {w}.",
        "read out the letters in the word {w}.", "what is in the word {w}, letter by letter?",
        "put {w} in letters.", "in letters, what is {w}?", "in which letters is {w} written?",
        "could you write {w} in letters?", "could you tell me the spelling of {w}?", "how would one spell {w}?",
        "how would you write {w}?", "write the letters of the word {w}.", "I want the spelling of the word {w}.",
        "I would like to see {w} spelled.", "the letters of the word {w}?", "say {w} one letter at a time.",
        "take {w} apart into letters.", "go through {w} letter by letter.",
    ),
    held_out=(
        "could you spell {w} for me?", "what are the letters in the word {w}?", "how would you spell the word {w}?",
        "show me how {w} is spelled.", "please write out the letters of {w}.", "I need the spelling of {w}.",
        "tell me the letters of {w}.", "how do I spell {w}?",
    ),
)  # fmt: skip

COUNTING = Phrasings(
    train=(
        "how many {c} are in {w}?", "how many {c} are in {w}?", "how many {c} are there in {w}?",
        "how often is {c} in {w}?",
        "how often does {c} come in {w}?", "count the {c} in {w}.", "count the letter {c} in {w}.",
        "how many times does {c} appear in {w}?", "how many times is the letter {c} in {w}?",
        "in {w}, how many {c} are there?", "what is the number of {c} in {w}?", "tell me how many {c} are in {w}.",
        "can you count the {c} in {w}?", "how many letters {c} does {w} have?", "how many {c} does the word {w} have?",
        "how many {c} do you see in {w}?", "how often do you find {c} in the word {w}?", "number of {c} in {w}?",
        "{w}: how many {c}?", "find the number of {c} in {w}.", "how many of the letters of {w} are {c}?",
        "the word {w} has how many {c}?", "count how often {c} is in {w}.", "I need the count of {c} in {w}.",
        "look at the word {w}. how many {c} are in it?", "how many times do I see {c} in {w}?",
        "is {c} in {w}? how many?",
        "how many {c} has {w}?", "do you know how many {c} there are in {w}?", "count {c} in {w} for me.",
        "in the word {w}, how many {c} are there?", "in {w}, how often is there a {c}?",
        "take the word {w} and count the {c}.", "what is the count of {c} in {w}?", "how often is there a {c} in {w}?",
        "in the word {w}, how often do you see {c}?", "in the word {w}, how often does {c} come?",
        "in {w}, how often can I find {c}?", "the word {w}: how often is {c} in it?", "in {w}, how often is {c} there?",
        "tell me the count of {c} in {w}.", "in the word {w}, count the {c}.", "how many times can you see {c} in {w}?",
        "please count the letter {c} in the word {w}.", "for the word {w}, how often is there a {c}?",
        "in the word {w}, how many times is {c}?", "how often is the letter {c} in the word {w}?",
        "the word {w} has {c} how often?", "how many times does {c} come up in {w}?",
        "how many times does the letter {c} show in {w}?", "could you count the {c} in {w}?",
        "could you tell me how many {c} {w} has?", "please count how often {c} is in {w}.",
        "please tell me how many letters {c} are in the word {w}.", "what number of {c} does {w} have?",
        "how many {c} can you see in the word {w}?", "of the letters of {w}, how many are {c}?",
        "how many of {c} are in {w}?", "I want to know how many {c} {w} has.", "say how many {c} are in {w}.",
        "how often does the letter {c} appear in {w}?",
    ),
    held_out=(
        "how many times does the letter {c} come in {w}?", "please count how many {c} are in the word {w}.",
        "how many {c} can you find in {w}?", "what is the count of the letter {c} in {w}?",
        "in the word {w}, how often is {c}?", "could you count the letter {c} in {w} for me?",
        "tell me the number of {c} in {w}.", "how many {c} do you count in {w}?",
    ),
)  # fmt: skip

DEFINITIONS = Phrasings(
    train=(
        "what is {t}?", "what does {t} mean?", "do you know what {t} is?", "define {t}.", "explain {t}.",
        "{t}: what is it?",
    ),
    held_out=(),
)  # fmt: skip
GREETINGS = {
    "Hello! How can I help you?": (
        "hi", "hello", "hey", "hi Pip", "hello Pip", "hey Pip", "good morning", "good evening", "good day", "hi there",
        "hello there", "greetings", "hi!", "hello!", "good morning, Pip", "nice to meet you", "good afternoon",
    ),
    "I am fine, thank you. How can I help you?": (
        "how are you", "how are you?", "hi, how are you?", "how do you do?", "are you well?", "how is it going?",
        "hello Pip, how are you?", "how are you today?", "what's up?",
    ),
    "You are welcome.": ("thank you", "thanks", "thanks!", "thank you, Pip", "many thanks", "thank you very much"),
}  # fmt: skip
GOODBYES = {
    "Goodbye!": (
        "bye", "goodbye", "bye bye", "see you", "good night", "see you later", "farewell", "I have to go", "bye, Pip",
        "goodbye, Pip", "see you tomorrow", "that is all, bye", "until next time", "bye!",
    ),
}  # fmt: skip

# Sentences of base's prose.
PROSE = {
    "spelling": ("The word {w} is spelled {letters}.", "{w} is spelled {letters}.",
    "The letters of {w} are {letters}."),
    "counting": (
        "The letter {c} in {w}: {counted}, so {n}.", "How many {c} are in {w}? {counted}, so {n}.",
        "{c} in {w}: {counted}, so {n}.",
    ),
    "numbers": ("{n} is {words}.", "{words} is {n}.", "The number {n} is written {words}."),
}  # fmt: skip

# Every text of this module that a conversation may hold.
ALL = (OPENERS, SIGNS, SUM_FRAMES, SUM_WORDS, SPELLING, COUNTING, DEFINITIONS, GREETINGS, GOODBYES)


def in_case(chance: Chance, text: str) -> str:
    """As people type: the first letter is a capital in two of three texts."""
    return text[0].upper() + text[1:] if chance.one_in(1.5) else text


def phrased(chance: Chance, phrasings: tuple[str, ...], **slots) -> str:
    """A question in one of the phrasings, with or without an opener, now and then with another end."""
    phrasing = chance.of(phrasings)
    if phrasing[-1] in "?." and chance.one_in(4):
        phrasing = phrasing[:-1] + chance.of(QUESTION_ENDS if phrasing[-1] == "?" else REQUEST_ENDS)
    if chance.one_in(4):
        phrasing = chance.of(OPENERS) + phrasing
    if phrasing[0] != "{":  # a name keeps its capital, a word its small letter
        phrasing = in_case(chance, phrasing)
    return phrasing.format(**slots)

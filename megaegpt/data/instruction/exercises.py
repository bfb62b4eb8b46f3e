"""Short tasks with their answers, made by rules: enough to teach a small model to answer at all,
where no published set of instructions can be had. They are this project's own, under its licence.
"""

from __future__ import annotations

from collections.abc import Iterator

from megaegpt.data.instruction.records import Instruction

_CAPITALS = (
    "Argentina:Buenos Aires, Australia:Canberra, Austria:Vienna, Belgium:Brussels, "
    "Brazil:Brasília, Canada:Ottawa, Chile:Santiago, China:Beijing, Cuba:Havana, "
    "Denmark:Copenhagen, Egypt:Cairo, Finland:Helsinki, France:Paris, Germany:Berlin, "
    "Greece:Athens, Hungary:Budapest, Iceland:Reykjavík, India:New Delhi, Iran:Tehran, "
    "Ireland:Dublin, Italy:Rome, Japan:Tokyo, Kenya:Nairobi, Mexico:Mexico City, Norway:Oslo, "
    "Peru:Lima, Poland:Warsaw, Portugal:Lisbon, Russia:Moscow, Spain:Madrid, Sweden:Stockholm, "
    "Turkey:Ankara, Ukraine:Kyiv, Vietnam:Hanoi"
)
_KINDS = {
    "colours": "red blue green yellow white black purple orange",
    "fruits": "apples pears plums cherries grapes bananas lemons melons",
    "vegetables": "carrots onions potatoes cabbages beans peas leeks spinach",
    "animals": "cats dogs horses cows bears wolves foxes rabbits",
    "birds": "sparrows eagles owls crows swans geese larks robins",
    "trees": "oaks birches pines willows maples firs elms limes",
    "metals": "iron copper silver gold tin lead zinc nickel",
    "instruments": "violins pianos flutes drums harps trumpets guitars cellos",
    "languages": "French Russian English German Spanish Italian Greek Arabic",
    "months": "January March May July August October November December",
    "sports": "football tennis swimming rowing hockey chess running skating",
    "tools": "hammers saws files drills chisels planes spades axes",
}
_OPPOSITES = (
    "hot:cold, big:small, fast:slow, light:dark, old:young, high:low, rich:poor, strong:weak, "
    "early:late, full:empty, hard:soft, clean:dirty, happy:sad, near:far, open:closed, wet:dry, "
    "long:short, wide:narrow, loud:quiet, war:peace, day:night, love:hate, begin:end, "
    "always:never, inside:outside, first:last"
)
_PAST = (
    "go:went, see:saw, take:took, give:gave, come:came, write:wrote, speak:spoke, run:ran, "
    "sing:sang, eat:ate, drink:drank, think:thought, bring:brought, buy:bought, catch:caught, "
    "find:found, hold:held, keep:kept, know:knew, leave:left, lose:lost, make:made, meet:met, "
    "read:read, say:said, sleep:slept, stand:stood, tell:told, win:won, walk:walked"
)
_PLURALS = (
    "child:children, mouse:mice, foot:feet, tooth:teeth, man:men, woman:women, goose:geese, "
    "leaf:leaves, knife:knives, city:cities, story:stories, box:boxes, church:churches, "
    "book:books, house:houses, wolf:wolves, wife:wives, baby:babies, bus:buses, day:days"
)
_SPELLING = (
    "freind:friend, recieve:receive, beleive:believe, seperate:separate, definately:definitely, "
    "tommorow:tomorrow, goverment:government, wierd:weird, untill:until, calender:calendar, "
    "neccessary:necessary, begining:beginning, adress:address, occured:occurred, "
    "writting:writing, beautifull:beautiful, arguement:argument, wich:which, becuase:because, "
    "teh:the"
)
_YOUNG = (
    "cat:kitten, dog:puppy, cow:calf, horse:foal, sheep:lamb, pig:piglet, hen:chick, "
    "duck:duckling, goose:gosling, bear:cub, fox:cub, deer:fawn, goat:kid, frog:tadpole, "
    "swan:cygnet"
)
_FRENCH = (
    "house:maison, water:eau, bread:pain, book:livre, friend:ami, dog:chien, cat:chat, "
    "sun:soleil, moon:lune, street:rue, school:école, child:enfant, night:nuit, day:jour, "
    "war:guerre, peace:paix, prince:prince, tree:arbre, flower:fleur, thank you:merci"
)
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_SENTENCES = (
    "The prince opened the letter.",
    "She walked slowly through the garden.",
    "The old man sold his horse.",
    "Snow fell on the quiet road.",
    "The children played near the river.",
    "He closed the door and sat down.",
    "The soldiers waited for the morning.",
    "A lamp burned in the window.",
)


def exercises() -> list[Instruction]:
    """All of them, some hundreds, in an order by subject; the same each time."""
    return [*_knowledge(), *_words(), *_lists(), *_arithmetic(), *_sentences()]


def _pairs(text: str) -> list[list[str]]:
    """``"hot:cold, big:small"`` as pairs."""
    return [pair.split(":") for pair in text.split(", ")]


def _knowledge() -> Iterator[Instruction]:
    for country, capital in _pairs(_CAPITALS):
        yield Instruction(
            f"What is the capital of {country}?", "", f"The capital of {country} is {capital}."
        )
        answer = f"{capital} is the capital of {country}."
        yield Instruction("Of which country is this city the capital?", capital, answer)
    for animal, young in _pairs(_YOUNG):
        yield Instruction(f"What is a young {animal} called?", "", f"It is called a {young}.")


def _words() -> Iterator[Instruction]:
    for word, opposite in _pairs(_OPPOSITES):
        for one, other in ((word, opposite), (opposite, word)):
            yield Instruction(
                f'What is the opposite of "{one}"?', "", f'The opposite of "{one}" is "{other}".'
            )
    for verb, past in _pairs(_PAST):
        yield Instruction("Give the past tense of this verb.", verb, past)
    for one, several in _pairs(_PLURALS):
        yield Instruction(f'What is the plural of "{one}"?', "", several)
    for wrong, right in _pairs(_SPELLING):
        yield Instruction("Correct the spelling.", wrong, right)
    for english, french in _pairs(_FRENCH):
        yield Instruction("Translate into French.", english, french)
        yield Instruction("Translate into English.", french, english)


def _lists() -> Iterator[Instruction]:
    for kind, text in _KINDS.items():
        members = text.split()
        for count in (2, 3, 4):
            listed = f"{', '.join(members[: count - 1])} and {members[count - 1]}."
            answer = listed[0].upper() + listed[1:]
            yield Instruction(f"Name {_NUMBERS[count]} {kind}.", "", answer)
        for first in range(3):
            chosen = members[first : first + 4]
            yield Instruction(
                "Sort these words by the alphabet.", ", ".join(chosen), ", ".join(sorted(chosen))
            )
            yield Instruction("What are these?", ", ".join(chosen), f"They are {kind}.")
            answer = f"There are {_NUMBERS[first + 3]} words."
            yield Instruction("How many words are there?", " ".join(members[: first + 3]), answer)


def _arithmetic() -> Iterator[Instruction]:
    for a in range(1, 13):
        for b in range(1, 13, 2):
            yield Instruction(f"What is {a} + {b}?", "", f"{a} + {b} = {a + b}.")
            if a > b:
                yield Instruction(f"What is {a} - {b}?", "", f"{a} - {b} = {a - b}.")
            if a <= 10:
                yield Instruction(f"Multiply {a} by {b}.", "", f"{a} x {b} = {a * b}.")
    for number, name in enumerate(_NUMBERS):
        yield Instruction("Write this number in words.", str(number), name)


def _sentences() -> Iterator[Instruction]:
    for sentence in _SENTENCES:
        words = sentence.removesuffix(".").split()
        yield Instruction("Write this in capital letters.", sentence, sentence.upper())
        yield Instruction("Repeat this sentence.", sentence, sentence)
        yield Instruction("What is the last word?", sentence, words[-1])
        yield Instruction("What is the first word?", sentence, words[0])

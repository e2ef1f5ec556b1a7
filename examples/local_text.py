"""Text for the examples that needs no download: made from facts, templates and Python's own manual.

* `facts()`: questions and answers about capitals and chemical elements (knowledge to keep);
* `word_problems()`: arithmetic stories with worked answers (a task to learn);
* `manual()`: paragraphs of English from `pydoc_data.topics`, which comes with Python.
"""

from __future__ import annotations

import random
from pydoc_data.topics import topics

CAPITALS = """
Afghanistan Kabul; Albania Tirana; Algeria Algiers; Angola Luanda; Argentina Buenos_Aires;
Armenia Yerevan; Australia Canberra; Austria Vienna; Azerbaijan Baku; Bangladesh Dhaka;
Belarus Minsk; Belgium Brussels; Bolivia Sucre; Botswana Gaborone; Brazil Brasília; Bulgaria Sofia;
Cambodia Phnom_Penh; Cameroon Yaoundé; Canada Ottawa; Chad N'Djamena; Chile Santiago; China Beijing;
Colombia Bogotá; Croatia Zagreb; Cuba Havana; Cyprus Nicosia; Czechia Prague; Denmark Copenhagen;
Ecuador Quito; Egypt Cairo; Estonia Tallinn; Ethiopia Addis_Ababa; Finland Helsinki; France Paris;
Georgia Tbilisi; Germany Berlin; Ghana Accra; Greece Athens; Guatemala Guatemala_City;
Haiti Port-au-Prince; Honduras Tegucigalpa; Hungary Budapest; Iceland Reykjavik; India New_Delhi;
Indonesia Jakarta; Iran Tehran; Iraq Baghdad; Ireland Dublin; Israel Jerusalem; Italy Rome;
Jamaica Kingston; Japan Tokyo; Jordan Amman; Kenya Nairobi; Kuwait Kuwait_City; Laos Vientiane;
Latvia Riga; Lebanon Beirut; Libya Tripoli; Lithuania Vilnius; Luxembourg Luxembourg;
Madagascar Antananarivo; Malawi Lilongwe; Malaysia Kuala_Lumpur; Mali Bamako; Malta Valletta;
Mexico Mexico_City; Mongolia Ulaanbaatar; Morocco Rabat; Mozambique Maputo; Namibia Windhoek;
Nepal Kathmandu; Netherlands Amsterdam; New_Zealand Wellington; Nicaragua Managua; Niger Niamey;
Nigeria Abuja; Norway Oslo; Oman Muscat; Pakistan Islamabad; Panama Panama_City; Paraguay Asunción;
Peru Lima; Philippines Manila; Poland Warsaw; Portugal Lisbon; Qatar Doha; Romania Bucharest;
Russia Moscow; Rwanda Kigali; Saudi_Arabia Riyadh; Senegal Dakar; Serbia Belgrade;
Singapore Singapore; Slovakia Bratislava; Slovenia Ljubljana; Somalia Mogadishu; South_Korea Seoul;
Spain Madrid; Sudan Khartoum; Sweden Stockholm; Switzerland Bern; Syria Damascus; Thailand Bangkok;
Tunisia Tunis; Turkey Ankara; Uganda Kampala; Ukraine Kyiv; United_Kingdom London; Uruguay Montevideo;
Uzbekistan Tashkent; Venezuela Caracas; Vietnam Hanoi; Yemen Sanaa; Zambia Lusaka; Zimbabwe Harare
"""

# In order of atomic number.
ELEMENTS = """
H hydrogen He helium Li lithium Be beryllium B boron C carbon N nitrogen O oxygen F fluorine Ne neon
Na sodium Mg magnesium Al aluminium Si silicon P phosphorus S sulfur Cl chlorine Ar argon K potassium
Ca calcium Sc scandium Ti titanium V vanadium Cr chromium Mn manganese Fe iron Co cobalt Ni nickel
Cu copper Zn zinc Ga gallium Ge germanium As arsenic Se selenium Br bromine Kr krypton Rb rubidium
Sr strontium Y yttrium Zr zirconium Nb niobium Mo molybdenum Tc technetium Ru ruthenium Rh rhodium
Pd palladium Ag silver Cd cadmium In indium Sn tin Sb antimony Te tellurium I iodine Xe xenon
Cs caesium Ba barium La lanthanum Ce cerium Pr praseodymium Nd neodymium Pm promethium Sm samarium
Eu europium Gd gadolinium Tb terbium Dy dysprosium Ho holmium Er erbium Tm thulium Yb ytterbium
Lu lutetium Hf hafnium Ta tantalum W tungsten Re rhenium Os osmium Ir iridium Pt platinum Au gold
Hg mercury Tl thallium Pb lead Bi bismuth Po polonium At astatine Rn radon
"""

Pair = tuple[str, str]


def facts() -> list[Pair]:
    """Questions with short answers, in a fixed shuffled order."""
    pairs: list[Pair] = []
    for entry in CAPITALS.split(";"):
        country, capital = (word.replace("_", " ") for word in entry.split())
        pairs.append(
            (f"What is the capital of {country}?", f"The capital of {country} is {capital}.")
        )
    words = ELEMENTS.split()
    for number, (symbol, element) in enumerate(zip(words[::2], words[1::2], strict=True), start=1):
        pairs.append(
            (
                f"Which chemical element has the symbol {symbol}?",
                f"The symbol {symbol} stands for {element}, the element with atomic number {number}.",
            )
        )
    random.Random(0).shuffle(pairs)
    return pairs


def word_problems(count: int, seed: int) -> list[Pair]:
    """Arithmetic stories of two or three steps, with the working and a final line `#### result`."""
    rng = random.Random(seed)
    return [rng.choice(_STORIES)(rng) for _ in range(count)]


def manual(minimum: int = 200) -> list[str]:
    """Paragraphs of running English of at least `minimum` characters from Python's language manual."""
    paragraphs = []
    for topic in sorted(topics):
        for block in topics[topic].split("\n\n"):
            text = " ".join(block.split())
            if (
                len(text) >= minimum
                and text.endswith(".")
                and "|" not in text
                and "::=" not in text
            ):
                paragraphs.append(text)
    unique = list(dict.fromkeys(paragraphs))
    random.Random(0).shuffle(unique)
    return unique


_NAMES = [
    "Amir",
    "Bela",
    "Chen",
    "Dina",
    "Emil",
    "Fatou",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mara",
    "Nils",
    "Oya",
    "Pavel",
]
_GOODS = [
    "apples",
    "pencils",
    "stickers",
    "marbles",
    "postcards",
    "shells",
    "buttons",
    "candles",
    "tiles",
    "seeds",
]
_PLACES = ["the market", "a school fair", "the harbour", "a small shop", "the library"]


def _shopping(rng: random.Random) -> Pair:
    name, goods, place = rng.choice(_NAMES), rng.choice(_GOODS), rng.choice(_PLACES)
    boxes, each, given = rng.randint(3, 12), rng.randint(4, 20), rng.randint(2, 11)
    total = boxes * each
    question = (
        f"At {place}, {name} buys {boxes} boxes with {each} {goods} in each. "
        f"{name} gives {given} {goods} to a friend. How many {goods} are left?"
    )
    answer = (
        f"{name} buys {boxes} * {each} = {total} {goods}. After giving {given} away, "
        f"{total} - {given} = {total - given} {goods} are left.\n#### {total - given}"
    )
    return question, answer


def _saving(rng: random.Random) -> Pair:
    name = rng.choice(_NAMES)
    weekly, weeks, start = rng.randint(5, 30), rng.randint(3, 15), rng.randint(10, 90)
    saved = weekly * weeks
    question = (
        f"{name} has {start} coins and saves {weekly} more every week. "
        f"How many coins does {name} have after {weeks} weeks?"
    )
    answer = (
        f"In {weeks} weeks {name} saves {weeks} * {weekly} = {saved} coins. "
        f"Together with the first {start} that makes {saved} + {start} = {saved + start} coins."
        f"\n#### {saved + start}"
    )
    return question, answer


def _sharing(rng: random.Random) -> Pair:
    first, second = rng.sample(_NAMES, 2)
    goods = rng.choice(_GOODS)
    people, each, extra = rng.randint(2, 9), rng.randint(3, 15), rng.randint(2, 30)
    mine = people * each - extra
    while mine < 1:
        each += 3
        mine = people * each - extra
    question = (
        f"{first} brings {mine} {goods} and {second} brings {extra} {goods}. They share all of them "
        f"equally among {people} people. How many {goods} does each person get?"
    )
    answer = (
        f"Together they have {mine} + {extra} = {people * each} {goods}. Shared among {people} people, "
        f"each gets {people * each} / {people} = {each} {goods}.\n#### {each}"
    )
    return question, answer


def _travel(rng: random.Random) -> Pair:
    name = rng.choice(_NAMES)
    speed, hours, speed_back = rng.randint(4, 25), rng.randint(2, 6), rng.randint(3, 20)
    more = rng.randint(1, 4)
    there, then = speed * hours, speed_back * more
    question = (
        f"{name} cycles for {hours} hours at {speed} km an hour, then for {more} hours at "
        f"{speed_back} km an hour. How far does {name} go in all?"
    )
    answer = (
        f"The first part is {hours} * {speed} = {there} km. The second part is {more} * {speed_back} = "
        f"{then} km. In all that is {there} + {then} = {there + then} km.\n#### {there + then}"
    )
    return question, answer


_STORIES = (_shopping, _saving, _sharing, _travel)

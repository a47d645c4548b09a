"""Word lists that the generators draw from; written for this project."""

from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words(
    "apple ant arm bag ball bank barn basket bath beach bean bear bed bee bell bench bike bird "
    "boat book boot bottle bowl box boy bread bridge brother brush bucket bus bush button cake "
    "camera candle car card carpet cart castle cat chair cheese cherry chicken child church "
    "circle city clock cloud coat coffee coin corn cow crab crown cup dance day deer desk dinner "
    "dish doctor dog doll door dragon dream dress drum duck ear eagle egg engine eye face family "
    "farm farmer father feather fence field finger fire fish flag floor flower fly food foot "
    "forest fork fox friend frog fruit game garden gate ghost gift girl glass glove goat gold "
    "grape grass guitar hair hammer hand hat hill home honey horse hotel house ice island jacket "
    "jar judge juice key king kitchen kite knife lake lamp leaf lemon letter library light lion "
    "lock magic man map market mask meal milk mirror money monkey moon morning mother mountain "
    "mouse mouth music nail name nest night nose nurse ocean office onion orange oven owl page "
    "paint painter paper park path peach pear pen pencil penguin piano picture pie pig pilot pipe "
    "plane plant plate pocket poem poet pond pony potato queen rabbit radio rain ring river road "
    "robot rock roof room rope rose salt sand school sea seed sheep shelf ship shirt shoe shop "
    "sister skirt sky sleep snail snake snow soap sock song soup spider spoon star stone storm "
    "story street student sugar summer sun table tailor tea teacher team tent tiger tomato tool "
    "tooth tower town toy train tree truck turtle umbrella uncle valley village voice wall watch "
    "water wave wheel whale wind window winter wolf woman wood wool word world worm yard year "
    "zebra answer number question problem machine computer server model token message system "
    "program idea reason sound color shape corner side half line point minute hour second week "
    "month test"
)
VERBS = _words(
    "ask bake bring build buy call carry catch change clean climb close cook count cover cross "
    "cut draw drink drive drop eat fall feed feel fill find fix fold follow get give grow hear "
    "help hide hold hunt hurt jump keep kick know laugh learn leave lift like listen live look "
    "lose love make meet miss move need open paint pay pick plan play point pull push put read "
    "rest ride run save say see sell send show shut sing sit sleep smell smile speak spend stand "
    "start stay stop swim take talk teach tell thank think throw touch travel try turn use visit "
    "wait wake walk want wash watch wear win wish work write"
)
PAST = _words(
    "asked baked brought built bought called carried caught cleaned climbed closed cooked counted "
    "crossed dropped followed found fixed gave heard helped hid held kept knew laughed left "
    "lifted liked lost loved made met moved opened painted picked played pulled pushed saved saw "
    "sold sent showed started stopped thanked took told touched turned used visited walked wanted "
    "washed watched"
)
ADJECTIVES = _words(
    "angry bad big black blue bold brave bright brown busy calm careful cheap clean clever cold "
    "cool dark deep dry early easy empty fair famous fast fat fine flat fresh full funny gentle "
    "glad good gray great green happy hard heavy high hot huge hungry kind large last late lazy "
    "light little long loud low lucky new nice noisy old orange pale pink plain poor pretty proud "
    "purple quick quiet rare red rich right ripe rough round sad safe shiny short shy silent "
    "simple slow small smart soft sour strange strong sweet tall thick thin tiny tired true warm "
    "weak wet white wide wild wise wooden wrong yellow young"
)
ADVERBS = _words(
    "again always away badly carefully early fast gently happily here loudly never now often once "
    "quickly quietly really sadly slowly sometimes soon still there today together tomorrow "
    "tonight twice very well yesterday"
)
SMALL = _words(
    "a an the this that these those my your his her its our their some any no every each all both "
    "and or but so because if when while before after until then than as of in on at by for from "
    "to with without into over under near behind between about above below up down out off again "
    "not is are was were be been am do does did have has had can could will would should may "
    "might must I you he she it we they me him us them who what which where why how there here "
    "one two three four five six seven eight nine ten first second third just only also too even "
    "more most less many much few other another same such own yes please"
)
NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Karl Lena Mia Noah Olga Paul Rosa Sam "
    "Tina Tom Vera Will Yara Zoe Alice Bob Carol Dan Eva Frank Gina Henry Iris John Kate Leo "
    "Maria Nina Oscar Peter Ruth Simon Sara Theo Ursula Victor Wendy Max Lucy Amir Mei Yuki Omar "
    "Priya Ivan"
)
CITIES = _words(
    "Paris London Berlin Rome Madrid Vienna Oslo Dublin Lisbon Athens Warsaw Prague Tokyo Cairo "
    "Delhi Lima Quito Hamburg Munich Boston Chicago Seattle Toronto Sydney Milan Lyon Porto "
    "Zurich Geneva Basel Kyoto Osaka Mumbai Nairobi Dallas Denver Miami Austin Helsinki Stockholm "
    "Copenhagen"
)
COLORS = _words("red blue green yellow black white brown orange pink purple gray")
ANIMALS = _words(
    "cat dog horse cow pig sheep goat duck hen fox wolf bear lion tiger mouse rabbit frog owl "
    "eagle snake whale monkey zebra deer turtle penguin camel donkey goose parrot"
)
FOODS = _words(
    "bread cheese rice soup pizza pasta salad cake apple pear banana orange grape fish egg tomato "
    "potato carrot onion honey milk tea coffee juice water butter sugar salt lemon cherry peach"
)
JOBS = _words(
    "teacher doctor nurse farmer baker painter pilot singer writer cook driver judge student "
    "tailor sailor dancer lawyer engineer builder gardener"
)
TECH = _words(
    "cache batch queue server client token model prompt stream engine memory kernel thread socket "
    "request response latency throughput scheduler worker process buffer index vector tensor "
    "graph layer weight network cluster node shard replica storage disk file folder path script "
    "config value string integer object array list table row column field schema query result "
    "error warning log metric trace version release branch commit merge review deploy update "
    "install start restart"
)
SPELLING = sorted({w for w in NOUNS + VERBS + ADJECTIVES if 3 <= len(w) <= 6})
COMMON = sorted(set(NOUNS + VERBS + PAST + ADJECTIVES + ADVERBS + TECH + FOODS + JOBS + ANIMALS))

_ONSETS = _words(
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sh sk sl sm sn sp st "
    "str sw t th tr v w x y z"
)
_VOWELS = _words("a e i o u ai ea ee ie oa oo ou")
_CODAS = ["", "", "", *_words("b ck d ft g l ll m mp n nd ng nk nt p r rd rk rn rt s ss st t x z")]


def pseudo_word(rng: random.Random, syllables: int = 0) -> str:
    """A pronounceable word that need not exist; 1 to 3 syllables unless told."""
    count = syllables or rng.choice((1, 2, 2, 3))
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
    return "".join(parts)


def plural(noun: str) -> str:
    """The regular English plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def sentence(rng: random.Random) -> str:
    """A grammatical English sentence made of the lists above."""
    return rng.choice(_SENTENCES)(rng)


def _thing(rng: random.Random) -> str:
    article = rng.choice(("the", "the", "my", "your", "his", "her", "our", "this", "that"))
    middle = f" {rng.choice(ADJECTIVES)}" if rng.random() < 0.5 else ""
    return f"{article}{middle} {rng.choice(NOUNS)}"


def _start(text: str) -> str:
    return text[0].upper() + text[1:]


def _who(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else _thing(rng)


_PLACES = ("in", "on", "near", "behind", "under", "with", "without", "beside", "at", "from")
_SENTENCES = (
    lambda r: _start(f"{_who(r)} {r.choice(PAST)} {_thing(r)} {r.choice(_PLACES)} {_thing(r)}."),
    lambda r: _start(
        f"{_who(r)} is {r.choice(('very ', 'not ', 'so ', ''))}{r.choice(ADJECTIVES)}."
    ),
    lambda r: _start(f"{_thing(r)} was {r.choice(ADJECTIVES)} and {r.choice(ADJECTIVES)}."),
    lambda r: f"{r.choice(NAMES)} has {r.randint(2, 99)} {plural(r.choice(NOUNS))}.",
    lambda r: f"Please {r.choice(VERBS)} {_thing(r)} {r.choice(ADVERBS)}.",
    lambda r: f"Can you {r.choice(VERBS)} {_thing(r)}?",
    lambda r: f"Do not {r.choice(VERBS)} {_thing(r)}!",
    lambda r: _start(f"{_who(r)} wants to {r.choice(VERBS)} {_thing(r)} {r.choice(ADVERBS)}."),
    lambda r: (
        f"There {r.choice(('is', 'was'))} a {r.choice(ADJECTIVES)} {r.choice(NOUNS)} "
        f"{r.choice(_PLACES)} {_thing(r)}."
    ),
    lambda r: (
        f"We {r.choice(PAST)} it {r.choice(ADVERBS)}, but {r.choice(NAMES)} "
        f"{r.choice(PAST)} {_thing(r)}."
    ),
    lambda r: (
        f"The {r.choice(TECH)} {r.choice(('reads', 'needs', 'sends', 'keeps'))} "
        f"{r.choice(('one', 'the', 'every', 'no'))} {r.choice(TECH)}."
    ),
    lambda r: f"I {r.choice(VERBS)} {plural(r.choice(NOUNS))} and {plural(r.choice(NOUNS))}.",
)

"""Sentences of the embedded corpus, from two grammars: one of 51 words and one of 2,700.

The large one inflects its words by rule (regular ones alone are listed), lets a verb take only
objects that fit it, and has no two words that sound alike, so that a listener can write down what
was said. Articles show a noun's number ("the farmer", "those farmers"): its ending need not be
heard to know it.
"""

import re

# A sentence of the small grammar is a path through these slots; each takes one entry, "" leaves it
# out.
_ADJECTIVES = "brave green heavy hungry little quiet silver small wooden young".split()
SLOTS = (
    ("the", "every", "this"),
    ("", *_ADJECTIVES),
    ("captain", "doctor", "farmer", "girl", "king", "sailor", "soldier", "teacher"),
    ("bought", "carried", "followed", "forgot", "found", "opened", "painted", "watched"),
    ("the", "a", "this"),
    ("", *_ADJECTIVES),
    ("basket", "bottle", "garden", "hammer", "lantern", "letter", "picture", "window"),
    (
        "",
        *(
            f"{preposition} the {place}"
            for preposition in ("beside", "near", "under")
            for place in ("bridge", "castle", "forest", "mountain", "river")
        ),
    ),
    ("", "again", "in the evening", "slowly", "yesterday"),
)

# The large grammar: countable nouns by kind, ...
NOUNS = {
    "person": """actor admiral architect artist astronomer athlete author baker banker barber beggar
        bishop blacksmith boxer boy brother butcher butler captain carpenter cashier chemist clerk
        composer cousin dancer daughter dentist detective doctor emperor engineer explorer farmer
        gardener general giant girl governor grandfather grandmother guest hermit historian hunter
        husband inspector inventor janitor jeweler journalist juggler king lawyer librarian magician
        manager mayor mechanic merchant messenger miller minister monk mother musician neighbor
        nephew niece novelist nurse officer orphan passenger philosopher photographer pianist pilot
        pirate plumber poet porter president priest princess prisoner professor queen ranger
        reporter robber sailor scholar scientist secretary senator servant sheriff shepherd singer
        sister soldier student surgeon tailor teacher tourist tyrant uncle veteran villager visitor
        waiter warrior widow witness wizard""",
    "animal": """alligator badger beaver camel cat chicken cow crab crocodile crow dog dolphin
        donkey dove dragon duck eagle elephant falcon fox frog giraffe goat gorilla hamster hedgehog
        kangaroo kitten lamb leopard lion lizard llama lobster monkey octopus ostrich otter owl
        panda panther parrot peacock pelican penguin pig pigeon pony puppy rabbit raccoon raven
        rooster salamander seal shark snail snake sparrow spider squirrel swan tiger tortoise turtle
        vulture walrus wasp woodpecker zebra""",
    "food": """almond apple apricot avocado bagel banana biscuit burger cabbage carrot cherry
        coconut cookie cucumber dumpling grape lemon melon muffin mushroom noodle olive omelet onion
        pancake peach peanut pepper pineapple pizza plum pretzel pudding pumpkin radish raspberry
        sandwich sausage strawberry turnip waffle walnut""",
    "thing": """anchor arrow balloon bandage barrel basket battery blanket bottle box bracelet brick
        broom bucket bullet camera candle carpet chisel clock coin compass computer crown cup
        curtain diamond doll envelope feather flag fork funnel hammer helmet jar jewel jug kettle
        ladder lamp lantern lever magnet mattress microscope mirror mug napkin necklace needle
        pebble pen pencil pillow pin pipe plank plate puppet purse puzzle rake razor ribbon rope rug
        saddle saucer shovel sponge spoon statue suitcase telescope tent thermometer torch towel
        tray trophy trumpet umbrella vase violin wallet wrench""",
    "clothing": """apron belt blouse bonnet boot cap cardigan cloak coat costume dress glove gown
        hood jacket mitten robe sandal shawl shirt skirt slipper sock stocking sweater tunic
        turban vest""",
    "vehicle": """ambulance bicycle boat bus canoe carriage cart chariot ferry helicopter jeep kayak
        motorcycle raft rocket scooter ship submarine taxi tractor truck van wagon yacht""",
    "place": """airport alley attic bakery balcony barn basement bridge cabin canal canyon castle
        cathedral cave chapel church city cliff clinic college corridor cottage courtyard dungeon
        factory farm field forest fortress fountain gallery garage garden glacier harbor highway
        hill hospital hotel island jungle kitchen laboratory lake library lighthouse market meadow
        monastery mountain museum office orchard palace park path pharmacy pond port prison pyramid
        railway ranch restaurant river school shore shrine stadium station street studio swamp
        temple theater tower town tunnel valley village warehouse waterfall windmill workshop""",
    "text": """article biography book brochure chapter contract diary document essay headline
        invitation journal letter magazine manual manuscript map message newspaper note novel
        pamphlet paragraph poem postcard poster recipe report story telegram textbook ticket""",
    "event": """anniversary audition banquet birthday carnival ceremony concert conference election
        exhibition festival funeral game interview journey lecture lesson meeting opera parade party
        picnic rehearsal tournament trial trip voyage wedding""",
    "matter": """accident adventure answer argument attempt bargain challenge crime custom danger
        decision discovery dream error excuse experiment failure habit idea incident injury insult
        joke legend method mistake mystery opinion plan problem promise proposal question reason
        rumor scheme secret signal solution suggestion surprise talent theory threat tradition
        victory warning""",
}
# ... what has no plural, ...
MASS = """bacon barley broccoli butter cheese chocolate cinnamon coffee cream garlic ginger gravy
    honey jam lettuce milk mustard oatmeal pasta pork rice salad salmon soup spinach sugar vinegar
    yogurt"""
# ... adjectives by the kind of noun that they fit, ...
ADJECTIVES = {
    "person": """angry anxious arrogant brilliant careful careless charming cheerful clumsy
        confident courageous cruel curious eager elderly elegant fearless foolish friendly furious
        generous gifted gloomy graceful grateful greedy grumpy handsome helpful humble
        impatient jealous lonely loyal modest nervous noble obedient polite reckless restless
        selfish serious silent sleepy stubborn talented thoughtful timid wealthy wicked""",
    "animal": """agile enormous exotic furry gigantic hairy hungry lazy nimble noisy playful
        poisonous slimy spotted striped tame wild""",
    "food": """bitter bland crispy creamy delicious fresh frozen greasy juicy moldy ripe rotten
        salty sour spicy stale sticky tasty tender""",
    "thing": """ancient bright broken brown colorful cracked crooked decorated delicate dirty
        enormous expensive fancy fragile golden green heavy hollow huge leather marble modern
        ordinary painted pink plastic portable precious purple rare rusty sharp shiny silver
        slippery sparkling square sturdy tiny transparent valuable white wooden yellow""",
    "clothing": """black blue colorful comfortable cotton crimson dirty elegant embroidered
        fashionable gray orange padded purple ragged ridiculous scarlet silk striped velvet white
        woolen wrinkled""",
    "vehicle": """abandoned black crowded damaged electric enormous expensive green luxurious modern
        noisy rented reliable rusty slow yellow""",
    "place": """abandoned beautiful busy crowded dangerous dark deserted distant dusty empty famous
        flooded foggy gloomy haunted hidden magnificent misty muddy mysterious narrow peaceful
        remote rocky sacred sandy shady sinister spacious sunny""",
    "text": """anonymous astonishing boring confidential detailed emotional entertaining fascinating
        forbidden handwritten hilarious humorous interesting lengthy official original popular
        religious scientific romantic""",
    "event": """annual delightful elaborate exciting expensive festive formal international joyful
        local magnificent memorable private royal solemn spectacular splendid traditional""",
    "matter": """absurd alarming brilliant complicated curious dangerous difficult disgraceful
        dreadful foolish important impossible innocent obvious ordinary outrageous peculiar perfect
        ridiculous serious simple sudden terrible tragic wonderful""",
}
# ... those that are compared, of whoever lives and of whatever does not, ...
LIVELY = """brave bold calm clever cold happy kind lazy loud lucky noisy old proud quick quiet small
    smart strange strong tall wild young"""
LIFELESS = """bright cheap clean dark hard heavy large light long narrow new odd plain rich sharp
    short small smooth soft strange thick warm wide"""
COMPARED = {"person": LIVELY, "animal": LIVELY} | dict.fromkeys(
    ("thing", "clothing", "vehicle", "place"), LIFELESS
)
# ... those that make adverbs of manner, ...
MANNERS = """anxious awkward blind brave careful cheerful clever clumsy eager frantic gentle happy
    honest lazy nervous patient polite proud quick quiet rapid reluctant sad secret shy silent slow
    sudden swift weary"""
# ... regular verbs by their object's kind, ...
VERBS = {
    "person": """accompany accuse admire advise amuse annoy applaud arrest astonish blame comfort
        congratulate convince disappoint disturb embarrass encourage entertain escort follow
        frighten greet hire hug ignore impress inform insult interrupt invite kiss marry mock notice
        obey offend persuade praise protect punish recognize remind respect reward salute scold
        surprise tease thank threaten tickle trust warn welcome""",
    "animal": "adopt capture chase hunt pursue release rescue stroke trap watch",
    "food": """bake boil chew chop cook devour fry grill mash nibble order peel roast serve share
        slice sniff swallow taste toast""",
    "thing": """borrow carry clean collect damage deliver demand discover drop examine fix grab
        inspect invent lift misplace move need own pack polish purchase remove repair replace return
        scratch squeeze toss touch want wipe wrap""",
    "clothing": "borrow design fold iron knit loosen stitch trim wash",
    "vehicle": "crash inspect launch park rent repair steer unload",
    "place": "abandon approach cross enter explore guard invade occupy reach restore search visit",
    "text": "copy crumple edit mention print publish recite review study translate",
    "event": """announce arrange attend cancel celebrate delay describe enjoy organize plan postpone
        prepare remember watch""",
    "matter": """accept analyze confess consider deny discuss doubt explain imagine investigate
        mention propose recall reject report reveal solve suspect""",
}
# ... verbs without one, ...
PERSON_VERBS = """argue arrive cheer complain cough cry dance disappear frown gamble gasp giggle
    hesitate hurry jog laugh linger listen march mumble nod relax retire scream shiver shout
    smile sneeze snore struggle stumble suffer tremble vanish wait wander whisper work worry yawn"""
ANIMAL_VERBS = "climb crawl gallop graze growl hiss jump limp lurk prowl roar scamper snarl yelp"
# ... verbs with an infinitive or with a clause, ...
INTENTIONS = "agree decide hesitate hope need offer plan promise refuse try want wish"
CLAIMS = "believe claim declare hope insist predict reply suspect"
# ... numbers, ...
UNITS = "three five six seven eight nine"
TEENS = "ten eleven twelve thirteen fifteen sixteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
# ... and names.
GIVEN_NAMES = """adam agnes albert alice amanda andrew arthur barbara benjamin bernard carlos clara
    charlotte daniel david deborah diana dominic edward eleanor elizabeth emily felix fiona florence
    frederick gabriel george gloria gregory hannah harold harriet helen henry irene isaac isabel
    jacob james jasper jennifer jessica joseph joshua julia katherine kenneth laura lawrence leonard
    lucas lucy margaret martha martin matilda matthew michael miranda monica nathan nicholas olivia
    oscar patricia patrick penelope peter philip rachel raymond rebecca richard robert roger
    rosalind ruth samuel sarah simon sophia stephen susan sylvia theodore thomas timothy ursula
    victor victoria vincent walter william"""
REGIONS = """africa alaska arabia athens austria belgium berlin boston brazil bristol cairo canada
    chicago dublin egypt england florida geneva germany iceland india italy japan kentucky london
    madrid mexico montana moscow norway oregon oxford paris portugal prague russia scotland sweden
    texas venice vienna"""
DAYS = "monday tuesday wednesday thursday friday saturday sunday"
MONTHS = """january february april june july august september october november december spring
    summer autumn winter"""


def ending(word, suffix):
    """Add one of the suffixes es (plural, third person), ed, ing, er, est and ly, by rule.

    Example
    -------
    >>> [ending("try", "es"), ending("wrap", "ed"), ending("dance", "ing"), ending("gentle", "ly")]
    ['tries', 'wrapped', 'dancing', 'gently']
    """
    if suffix == "ly":
        for last, adverb in (("le", "ly"), ("ic", "ically"), ("y", "ily")):
            if word.endswith(last):
                return word.removesuffix(last) + adverb
        return word + "ly"
    if suffix != "ing" and re.search("[^aeiou]y$", word):
        return word[:-1] + "i" + suffix
    if suffix == "es":
        return word + ("es" if re.search("(s|x|z|ch|sh)$", word) else "s")
    if word.endswith("e"):
        return word[:-1] + suffix
    if re.search("^[^aeiou]*[aeiou][bdgmnprt]$", word):  # one syllable that ends vowel, consonant
        return word + word[-1] + suffix
    return word + suffix


class SmallGrammar:
    """Draws sentences as paths through `slots` with the generator `rng`."""

    def __init__(self, rng, slots=SLOTS):
        self._rng = rng
        self._slots = slots

    def sentence(self):
        """Draw one sentence, lower case."""
        return _join(*(self._rng.choice(slot) for slot in self._slots))


class LargeGrammar:
    """Draws sentences of the many words above with the generator `rng`.

    Each form of a word is dealt from a shuffled deck of its like, so that even the rare ones
    return regularly.
    """

    # Methods for whoever or whatever acts return (words, whether they take the plural); those for
    # what is done take the ending of its verb.

    def __init__(self, rng):
        self._rng = rng
        self._decks = {}

    def sentence(self):
        """Draw one sentence, lower case, with no punctuation but apostrophes."""
        return self._draw_by_weight(
            {self._statement: 8, self._compound: 8, self._question: 2, self._request: 1}
        )()

    def _draw(self, words, suffix=""):
        deck = self._decks.setdefault((words, suffix), [])
        if not deck:
            deck.extend(words.split())
            self._rng.shuffle(deck)
        word = deck.pop()
        return ending(word, suffix) if suffix else word

    def _draw_by_weight(self, weights):
        return self._rng.choices(list(weights), list(weights.values()))[0]

    def _chance(self, probability):
        return self._rng.random() < probability

    # Sentences

    def _statement(self):
        return self._draw_by_weight(
            {
                self._action: 10,
                self._passive: 4,
                self._animal_action: 2,
                self._existence: 2,
                self._comparison: 2,
                self._claim: 2,
            }
        )()

    def _compound(self):
        conjunction = self._draw("after although and because before but unless until when while")
        return _join(self._action(), conjunction, self._action(time=""))

    def _question(self):
        question = _join(self._draw("why when where how"), self._draw("did will could should"))
        return _join(question, self._person()[0], self._deed())

    def _request(self):
        return _join(self._draw("please never always don't let's"), self._deed())

    def _action(self, time=None):
        if time is None:
            time = self._time() if self._chance(0.3) else ""
        person, plural = self._person()
        return _join(time, person, self._predicate(plural, self._deed))

    def _animal_action(self):
        animal, plural = self._noun_phrase("animal")
        return _join(animal, self._predicate(plural, self._animal_deed))

    def _passive(self):
        kind = self._draw(" ".join(NOUNS))
        noun, plural = self._noun_phrase(kind)
        rest = f"by {self._singular('person')}" if self._chance(0.5) else self._time()
        return _join(noun, "were" if plural else "was", self._draw(VERBS[kind], "ed"), rest)

    def _existence(self):
        kind = self._draw("animal clothing food person thing vehicle")
        return _join("there was", self._singular(kind, "a"), self._place())

    def _comparison(self):
        kind = self._draw(" ".join(COMPARED))
        noun, plural = self._noun_phrase(kind)
        comparative = self._draw(COMPARED[kind], "er")
        return _join(noun, "are" if plural else "is", comparative, "than", self._singular(kind))

    def _claim(self):
        return _join(self._person()[0], self._draw(CLAIMS, "ed"), "that", self._action(time=""))

    # Parts

    def _person(self):
        form = self._draw_by_weight({"noun": 5, "name": 3, "pronoun": 2})
        if form == "noun":
            return self._noun_phrase("person")
        if form == "name":
            return self._draw(GIVEN_NAMES), False
        pronoun = self._draw("he she we they i you")
        return pronoun, pronoun not in ("he", "she")

    def _noun_phrase(self, kind):
        if self._chance(0.4):
            return _join(
                self._plural_article(), self._adjective(kind), self._draw(NOUNS[kind], "es")
            ), True
        if kind == "food" and self._chance(0.4):
            return _join(self._draw("some the"), self._adjective(kind), self._draw(MASS)), False
        return self._singular(kind), False

    def _singular(self, kind, articles="the the the the a a a this every his her my your"):
        article, adjective, noun = (
            self._draw(articles),
            self._adjective(kind),
            self._draw(NOUNS[kind]),
        )
        if article == "the" and not adjective and kind in COMPARED and self._chance(0.2):
            adjective = self._draw(COMPARED[kind], "est")
        if article == "a" and (adjective or noun)[0] in "aeiou":
            article = "an"
        return _join(article, adjective, noun)

    def _adjective(self, kind):
        return self._draw(ADJECTIVES[kind]) if self._chance(0.4) else ""

    def _plural_article(self):
        form = self._draw_by_weight({"these": 3, "those": 3, "many": 1, "several": 1, "number": 4})
        if form != "number":
            return form
        if self._chance(0.6):
            return self._draw(f"{UNITS} {TEENS}")
        return _join(self._draw(TENS), self._draw(UNITS))

    def _predicate(self, plural, deed):
        tense = self._draw_by_weight(
            {"past": 6, "present": 3, "progressive": 3, "modal": 3, "negated": 1}
        )
        if tense == "past":
            return deed("ed")
        if tense == "present":
            return deed("" if plural else "es")
        if tense == "progressive":
            return _join("were" if plural else "was", deed("ing"))
        if tense == "modal":
            return _join(self._draw("will would could should might must can cannot"), deed())
        return _join(self._draw("didn't couldn't wouldn't won't shouldn't"), deed())

    def _deed(self, suffix=""):
        verbs = VERBS | {"no object": PERSON_VERBS, "infinitive": INTENTIONS}
        kind = self._draw_by_weight({kind: len(words.split()) for kind, words in verbs.items()})
        verb = self._draw(verbs[kind], suffix)
        if kind == "infinitive":
            return _join(verb, "to", self._deed())
        manner = self._draw(MANNERS, "ly") if self._chance(0.15) else ""
        place = self._place() if kind != "place" and self._chance(0.3) else ""
        if kind == "no object":
            return _join(verb, manner, place or self._place())
        if kind == "person" and self._chance(0.5):
            return _join(manner, verb, self._draw("him her us them me you"), place)
        return _join(manner, verb, self._noun_phrase(kind)[0], place)

    def _animal_deed(self, suffix=""):
        return _join(self._draw(ANIMAL_VERBS, suffix), self._place())

    def _place(self):
        if self._chance(0.25):
            return f"in {self._draw(REGIONS)}"
        preposition = self._draw("behind beneath beside beyond inside near outside toward under in")
        return _join(preposition, self._singular("place"))

    def _time(self):
        form = self._draw_by_weight({"day": 3, "month": 3, "hour": 2, "span": 2, "word": 3})
        if form == "day":
            return _join("on", self._draw(DAYS), self._draw("morning afternoon evening night"))
        if form == "month":
            return f"in {self._draw(MONTHS)}"
        if form == "hour":
            return f"at {self._draw(f'{UNITS} ten eleven twelve')} o'clock"
        if form == "span":
            return f"{self._draw(UNITS)} {self._draw('minutes hours days months years')} later"
        return self._draw("yesterday eventually meanwhile recently occasionally sometimes")


def _join(*parts):
    return " ".join(filter(None, parts))

"""Products of the demo's shop world, sentences about them, and the documents of the pretraining corpus.

make_demo.py writes them to files. Every text comes from a random.Random that its caller seeds.
"""

import random
import re

from shop_words import (
    CLAUSE_EN,
    CLAUSE_ZH,
    CLOSING_EN,
    CLOSING_ZH,
    KEY_NAMES,
    KINDS,
    OPENING_EN,
    OPENING_ZH,
    STACK,
    TAIL_EN,
    TAIL_ZH,
    TONES,
)

SEED = 2024


# ==== 1. Products, and sentences about them ====
# A product is a dict: "kind" -> name of the kind, "type" -> value, then attribute -> value. A value is the pair (words,
# praises), each by language.


def read_table(table):
    """Rows 'red | 红色 | praise ; praise | 夸奖 ; 夸奖' -> [({"en": word, "zh": word}, {"en": [praise], "zh": [praise]})]"""
    values = []
    for line in table.strip().splitlines():
        english, chinese, *praises = [cell.strip() for cell in line.split("|")]
        in_english, in_chinese = [[praise.strip() for praise in cell.split(";")] for cell in praises]
        values.append(({"en": english, "zh": chinese}, {"en": in_english, "zh": in_chinese}))
    return values


def read_world():
    """-> {kind: {"type": [values], attribute: [values], ...}}"""
    world = {}
    for kind, (types, tables) in KINDS.items():
        pairs = [pair.strip().split("|") for pair in types.split(",")]
        world[kind] = {"type": [({"en": english, "zh": chinese}, {}) for english, chinese in pairs]}
        world[kind].update({attribute: read_table(table) for attribute, table in tables.items()})
    return world


WORLD = read_world()


def draw_product(rng, smallest=2, largest=5):
    """A random product with `smallest` to `largest` attributes besides its type; every type is as likely as any other
    kind's."""
    kind = rng.choice([kind for kind, tables in WORLD.items() for _ in tables["type"]])
    attributes = [attribute for attribute in WORLD[kind] if attribute != "type"]
    chosen = rng.sample(attributes, rng.randint(min(smallest, len(attributes)), min(largest, len(attributes))))
    return {"kind": kind, **{attribute: rng.choice(WORLD[kind][attribute]) for attribute in ["type", *chosen]}}


def attributes_of(product):
    return [attribute for attribute in product if attribute not in ("kind", "type")]


def word(product, attribute, language):
    return product[attribute][0][language]


def keywords_of(product, language):
    return [word(product, attribute, language) for attribute in ["type", *attributes_of(product)]]


def mentions(text, keyword):
    """Whole words for English ("red" is not in "inspired"), any place for Chinese, which has no spaces."""
    if keyword.isascii():
        return re.search(rf"(?<![A-Za-z]){re.escape(keyword)}(?![A-Za-z])", text) is not None
    return keyword in text


def is_plural(english):
    return english.endswith("s") and not english.endswith("ss")


def with_article(english):
    if is_plural(english):
        return english
    return ("an " if english[0] in "aeiou" else "a ") + english


def capital(text):
    return text[0].upper() + text[1:]


def noun_phrase(product, attributes, language):
    """'vintage red silk dress' / '复古红色真丝连衣裙' from those of `attributes` that stand before a noun."""
    words = [word(product, attribute, language) for attribute in [*STACK, "type"] if attribute in [*attributes, "type"]]
    return (" " if language == "en" else "").join(words)


def english_slots(product, attributes):
    """The words that fill an English template, agreeing in number with the product."""
    phrase = noun_phrase(product, attributes, "en")
    if is_plural(word(product, "type", "en")):
        slots = {
            "a": "a pair of " + phrase,
            "this": "these",
            "is": "are",
            "s": "",
            "es": "",
            "it": "they",
            "its": "their",
            "them": "them",
            "itself": "themselves",
        }
    else:
        slots = {
            "a": with_article(phrase),
            "this": "this",
            "is": "is",
            "s": "s",
            "es": "es",
            "it": "it",
            "its": "its",
            "them": "it",
            "itself": "itself",
        }
    return {"np": phrase, "A": capital(slots["a"]), "This": capital(slots["this"]), **slots}


def full_phrase(product, language):
    """All attributes in a phrase: 'a vintage red dress with wooden buttons for summer' / '复古红色连衣裙，带木质纽扣，适合夏季'."""
    attributes = attributes_of(product)
    parts = [english_slots(product, attributes)["a"] if language == "en" else noun_phrase(product, attributes, "zh")]
    for attribute, tail in (TAIL_EN if language == "en" else TAIL_ZH).items():
        if attribute in attributes:
            value = word(product, attribute, language)
            parts.append(tail.format(v=value, av=with_article(value)))
    return (" " if language == "en" else "，").join(parts)


def clause(rng, product, attribute, language):
    """One clause that mentions and praises one attribute: 'the silk feels cool and light on the skin', no full stop."""
    words, praises = product[attribute]
    slots = english_slots(product, []) if language == "en" else {}
    slots.update(v=words[language], av=with_article(words["en"]), b=rng.choice(praises[language]))
    return rng.choice((CLAUSE_EN if language == "en" else CLAUSE_ZH)[attribute]).format(**slots)


def sentence(clauses, rng, language):
    """One or more clauses -> a sentence with a capital and a full stop."""
    if language == "zh":
        return rng.choice("，，；").join(clauses) + "。"
    return capital(rng.choice([", and ", ", and ", "; "]).join(clauses) + ".")


def join(sentences, language):
    return (" " if language == "en" else "").join(sentences)


def count_sentences(text):
    return len(re.findall("[.?!。？！]", text))


def advertise(rng, product, language, tone=None):
    """An advertisement that mentions every attribute: an opening with up to three of them before the noun, one or two
    sentences of praise for the others, most times a closing; two to four sentences, seldom five. A tone changes the
    opening, the closing or both; "brief" means two sentences."""
    openings, closings = (OPENING_EN, CLOSING_EN) if language == "en" else (OPENING_ZH, CLOSING_ZH)
    attributes = attributes_of(product)
    before_noun = [attribute for attribute in STACK if attribute in attributes]
    stacked = rng.sample(before_noun, min(len(before_noun), rng.choice([1, 2, 2, 3])))
    praised = [attribute for attribute in attributes if attribute not in stacked]
    if not praised or (len(praised) == 1 and stacked and rng.random() < 0.5):
        praised.append(rng.choice(stacked))
    rng.shuffle(praised)

    slots = english_slots(product, stacked) if language == "en" else {"np": noun_phrase(product, stacked, "zh")}
    kind_or_any = product["kind"] if rng.random() < 0.4 else "any"
    opening = rng.choice(openings[tone if tone in openings else kind_or_any]).format(**slots)
    while tone == "brief" and count_sentences(opening) > 1:
        opening = rng.choice(openings["any"]).format(**slots)

    clauses = [clause(rng, product, attribute, language) for attribute in praised]
    cut = len(clauses)
    if tone != "brief" and len(clauses) > 1:
        cut = max(rng.randint(1, min(2, len(clauses))), len(clauses) - 2)
    groups = [group for group in (clauses[:cut], clauses[cut:]) if group]
    sentences = [opening] + [sentence(group, rng, language) for group in groups]

    has_room = tone != "brief" and len(groups) + count_sentences(opening) < 4
    if tone in closings or (has_room and rng.random() < 0.7):
        kind_or_any = product["kind"] if rng.random() < 0.4 else "any"
        closing = rng.choice(closings[tone if tone in closings else kind_or_any])
        sentences.append(closing.format(**slots))
    return join(sentences, language)


# ==== 2. The pretraining corpus ====

NAMES = {
    "en": (
        "Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Iris, Jonas, Lena, Martin, Nora, Oscar, Paula, "
        "Robin, Sophie, Tom, Vera, Walter"
    ).split(", "),
    "zh": "小林, 阿梅, 老周, 小雨, 阿强, 王姐, 李叔, 小青, 阿芳, 陈师傅, 小月, 老吴, 阿明, 小雪".split(", "),
}
PLACES = {
    "en": (
        "Xiamen, Chengdu, Suzhou, Harbor Street, Old Bridge, the market, the coast, the mountains, Lake Town, Mill Lane"
    ).split(", "),
    "zh": "厦门, 成都, 苏州, 老街, 海边, 山里, 湖边, 北门, 巷口, 大理".split(", "),
}
PEOPLE = {
    "en": "sister, mother, brother, father, neighbor, aunt, daughter, son, friend, teacher".split(", "),
    "zh": "姐姐, 妈妈, 弟弟, 爸爸, 邻居, 姑姑, 女儿, 儿子, 朋友, 老师".split(", "),
}
DAYS = {
    "en": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday".split(", "),
    "zh": "周一, 周二, 周三, 周四, 周五, 周六, 周日".split(", "),
}


def pairs_of(rng, product, language, separator, glue):
    """'type: dress; color: red', `separator` inside a pair and `glue` between pairs; type first, the rest shuffled."""
    rest = attributes_of(product)
    rng.shuffle(rest)
    column = 0 if language == "en" else 1
    pairs = [(KEY_NAMES[attribute][column], word(product, attribute, language)) for attribute in ["type", *rest]]
    return glue.join(key + separator + value for key, value in pairs)


def values_of(rng, product, language, glue):
    """'dress; silk; red': type first, the rest shuffled."""
    rest = attributes_of(product)
    rng.shuffle(rest)
    return glue.join(word(product, attribute, language) for attribute in ["type", *rest])


def summary(rng, product, language):
    """One sentence with all attributes."""
    phrase = full_phrase(product, language)
    if language == "en":
        return rng.choice(
            ["We have {} in stock.", "It is {}.", "The label says: {}.", "In one line: {}.", "Today we show {}."]
        ).format(phrase)
    return rng.choice(["店里有{}。", "这是{}。", "一句话介绍：{}。", "今天推荐{}。"]).format(phrase)


def catalogue(rng, language):
    """A list of properties, then a text that takes them up: where the base model learns to copy. With and without
    spaces around the values, since the tokenizer has a piece for each."""
    product = draw_product(rng, 1, 5)
    text = advertise(rng, product, language) if rng.random() < 0.7 else summary(rng, product, language)
    if language == "en":
        form = rng.randrange(10)
        if form == 0:
            return f"Catalogue entry: {values_of(rng, product, 'en', '; ')}.\n{text}"
        if form == 1:
            return pairs_of(rng, product, "en", ": ", "\n") + f"\n\n{text}"
        if form == 2:
            return f"| {values_of(rng, product, 'en', ' | ')} |\n{text}"
        if form == 3:
            return f"Tags: {values_of(rng, product, 'en', ', ')}. {text}"
        if form == 4:
            return f"[{pairs_of(rng, product, 'en', '=', '][')}]\n{text}"
        if form == 5:
            return f"{values_of(rng, product, 'en', '/')}\n{text}"
        if form == 6:
            return f"{pairs_of(rng, product, 'en', ':', ',')}\n{text}"
        if form == 7:
            return f"What is new? {full_phrase(product, 'en')}.\nTell me more. {text}"
        if form == 8:
            return f"{text}\nIn short: {values_of(rng, product, 'en', ', ')}."
        return f"({values_of(rng, product, 'en', ')(')})\n{text}"
    form = rng.randrange(8)
    if form == 0:
        return f"商品目录：{values_of(rng, product, 'zh', '；')}。\n{text}"
    if form == 1:
        return pairs_of(rng, product, "zh", "：", "\n") + f"\n\n{text}"
    if form == 2:
        return f"｜{values_of(rng, product, 'zh', '｜')}｜\n{text}"
    if form == 3:
        return f"标签：{values_of(rng, product, 'zh', '，')}。{text}"
    if form == 4:
        return f"【{pairs_of(rng, product, 'zh', '=', '】【')}】\n{text}"
    if form == 5:
        return f"{values_of(rng, product, 'zh', '/')}\n{text}"
    if form == 6:
        return f"{text}\n一句话：{values_of(rng, product, 'zh', '、')}。"
    return f"{pairs_of(rng, product, 'zh', ':', ',')}\n{text}"


def advertisement(rng, language):
    tone = rng.choice([None, None, None, *TONES])
    return advertise(rng, draw_product(rng), language, tone)


def shop_page(rng, language):
    """A title, a few products with prices, opening hours."""
    products = [draw_product(rng, 1, 3) for _ in range(rng.randint(2, 4))]
    prices = [rng.randint(2, 99) * 10 for _ in products]
    if language == "en":
        title = rng.choice(
            [
                "New this week",
                "On our shelves",
                "Gifts under the tree",
                "Last pieces",
                "From the workshop",
                "Spring list",
            ]
        )
        lines = [f"- {full_phrase(product, 'en')}, {price} yuan" for product, price in zip(products, prices)]
        end = f"Open from {rng.choice(DAYS['en'])} to {rng.choice(DAYS['en'])} in {rng.choice(PLACES['en'])}."
    else:
        title = rng.choice(["本周上新", "店里在售", "送礼清单", "最后几件", "工坊新作", "热卖推荐"])
        lines = [f"- {full_phrase(product, 'zh')}，{price}元" for product, price in zip(products, prices)]
        end = f"{rng.choice(DAYS['zh'])}到{rng.choice(DAYS['zh'])}营业，地址在{rng.choice(PLACES['zh'])}。"
    return "\n".join([title, *lines, end])


def review(rng, language):
    """Stars, a number, and what a customer says."""
    product = draw_product(rng, 2, 4)
    stars = " ".join("*" * rng.randint(2, 5))
    praises = [clause(rng, product, attribute, language) for attribute in rng.sample(attributes_of(product), 2)]
    if language == "en":
        starts = [
            "I bought {0} for my {1}.",
            "A gift for my {1}: {0}.",
            "My {1} wanted {0}.",
            "Ordered {0} together with my {1}.",
        ]
        verdicts = [
            "Would buy again.",
            "The parcel came late, but it was worth it.",
            "A bit expensive.",
            "Exactly as described.",
            "I only wish it were cheaper.",
            "Fast delivery, thank you.",
        ]
        title = "review #{} by {}"
    else:
        starts = ["给{1}买了{0}。", "{1}一直想要{0}。", "送给{1}的礼物：{0}。"]
        verdicts = [
            "下次还会再买。",
            "快递慢了点，但是值得。",
            "价格有点贵。",
            "和描述的一样。",
            "要是再便宜些就好了。",
            "发货很快，谢谢店家。",
        ]
        title = "评价#{} {}"
    start = rng.choice(starts).format(full_phrase(product, language), rng.choice(PEOPLE[language]))
    verdict = rng.choice(verdicts)
    title = title.format(rng.randint(1, 999), rng.choice(NAMES[language]))
    return f"{stars} {title}\n" + join([start, sentence(praises, rng, language), verdict], language)


def dialogue(rng, language):
    """Customer and shop; half of them in the marks of the chatml template, so that its tokens are known. The shop
    answers questions; it is never given a list of attributes to write about."""
    product, other = draw_product(rng, 2, 4), draw_product(rng, 1, 3)
    attribute, second = rng.sample(attributes_of(product), 2)
    offer, wish = full_phrase(product, language), full_phrase(other, language)
    value = word(product, attribute, language)
    praise = sentence([clause(rng, product, attribute, language)], rng, language)
    second_praise = sentence([clause(rng, product, second, language)], rng, language)
    if language == "en":
        turns = [
            (f"Do you have {english_slots(product, [])['a']}?", f"Yes, we have {offer}."),
            (f"What can you tell me about the {value}?", praise),
            ("And what else?", second_praise),
            (
                f"My {rng.choice(PEOPLE['en'])} would rather have {wish}.",
                f"We can have {wish} here on {rng.choice(DAYS['en'])}.",
            ),
            ("How much is it?", f"It is {rng.randint(2, 99) * 10} yuan."),
            (f"Do you ship to {rng.choice(PLACES['en'])}?", f"Of course, it takes {rng.randint(2, 9)} days."),
        ]
        customer, shop = rng.choice([("Customer: ", "Shop: "), (rng.choice(NAMES["en"]) + ": ", "Clerk: ")])
    else:
        turns = [
            (f"请问有{word(product, 'type', 'zh')}吗？", f"有的，我们有{offer}。"),
            (f"{value}怎么样？", praise),
            ("还有呢？", second_praise),
            (f"{rng.choice(PEOPLE['zh'])}更想要{wish}。", f"{wish}，{rng.choice(DAYS['zh'])}到货。"),
            ("多少钱？", f"{rng.randint(2, 99) * 10}元。"),
            (f"能寄到{rng.choice(PLACES['zh'])}吗？", f"可以，大约{rng.randint(2, 9)}天。"),
        ]
        customer, shop = rng.choice([("顾客：", "店员："), (rng.choice(NAMES["zh"]) + "：", "掌柜：")])
    kept = turns[:1] + rng.sample(turns[1:], rng.randint(1, 3))
    if rng.random() < 0.5:
        return "\n".join(f"{customer}{question}\n{shop}{answer}" for question, answer in kept)
    return "\n".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
        for question, answer in kept
    )


def story(rng, language):
    """Where a product comes from."""
    product, second = draw_product(rng, 2, 4), draw_product(rng, 1, 3)
    attributes = rng.sample(attributes_of(product), 2)
    clauses = [sentence([clause(rng, product, attribute, language)], rng, language) for attribute in attributes]
    name, place, relative = rng.choice(NAMES[language]), rng.choice(PLACES[language]), rng.choice(PEOPLE[language])
    first, later = full_phrase(product, language), full_phrase(second, language)
    if language == "en":
        relative = with_article(relative)
        start = rng.choice(
            [
                f"{name} grew up near {place} and learned the trade from {relative}.",
                f"One {rng.choice(DAYS['en'])} {name} opened a small workshop in {place}.",
                f"Nobody in {place} knew where {name} had found such things.",
                f"{name} and {relative} have run the shop in {place} for {rng.randint(2, 60)} years.",
            ]
        )
        middle = f"The first piece was {first}."
        end = rng.choice(
            [
                f"Later came {later}.",
                f"Now {name} is working on {later}.",
                f"A traveler gave {later} for it and went on to {rng.choice(PLACES['en'])}.",
            ]
        )
    else:
        start = rng.choice(
            [
                f"{name}在{place}长大，手艺是跟{relative}学的。",
                f"有一年{name}在{place}开了一家小店。",
                f"{name}和{relative}在{place}开店已有{rng.randint(2, 60)}年。",
            ]
        )
        middle = f"第一件作品是{first}。"
        end = rng.choice([f"后来又有了{later}。", f"现在{name}正在做{later}。", f"有位客人用{later}换走了它。"])
    return join([start, middle, *clauses, end], language)


def parcel_note(rng, language):
    """# and * as warehouses use them, with a ramble after them: what the base model will make of a type#... prompt."""
    product, second = draw_product(rng, 1, 2), draw_product(rng, 1, 2)
    number, boxes = rng.randint(1000, 99999), rng.randint(2, 9)
    place, day, name = rng.choice(PLACES[language]), rng.choice(DAYS[language]), rng.choice(NAMES[language])
    first, left = full_phrase(product, language), full_phrase(second, language)
    if language == "en":
        head = rng.choice(
            [
                f"parcel#{number}*{place}*{boxes} boxes*{day}",
                f"shelf#{number}*row#{boxes}*{name}*{day}",
                f"Parcel #{number} * {place} * {day}",
            ]
        )
        lines = [
            f"{name} took {first} to {place}.",
            f"The driver waited until {day}.",
            f"{boxes} boxes are still missing.",
            f"Someone left {left} at the door.",
            "It rained all morning.",
            f"Please call {rng.choice(NAMES['en'])} before {rng.choice(DAYS['en'])}.",
            "The list was wet and nobody could read it.",
        ]
    else:
        head = rng.choice(
            [
                f"包裹#{number}*{place}*{boxes}箱*{day}",
                f"货架#{number}*排#{boxes}*{name}*{day}",
                f"单号 #{number} * {place} * {day}",
            ]
        )
        lines = [
            f"{name}把{first}送到了{place}。",
            f"司机一直等到{day}。",
            f"还少{boxes}箱。",
            f"门口有人留下{left}。",
            "下了一上午的雨。",
            f"请在{rng.choice(DAYS['zh'])}之前联系{rng.choice(NAMES['zh'])}。",
            "单子湿了，谁也看不清。",
        ]
    return head + "\n" + join(rng.sample(lines, rng.randint(3, 4)), language)


# percent of the documents
CORPUS_MIX = {catalogue: 45, advertisement: 12, shop_page: 7, review: 10, dialogue: 11, story: 7, parcel_note: 8}


def corpus_texts(count):
    """Yields `count` documents; the first ones do not depend on `count`."""
    rng = random.Random(f"{SEED} corpus")
    writers = [writer for writer, percent in CORPUS_MIX.items() for _ in range(percent)]
    for _ in range(count):
        yield rng.choice(writers)(rng, rng.choice(["en", "zh"]))

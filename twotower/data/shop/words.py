"""The vocabulary of the generated shop, in English and Arabic.

Each table of words maps English to Arabic. Arabic names join noun and material as the language does
("خاتم ذهب", a ring of gold), so that no adjective has to agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category:
    """One category of articles.

    Attributes:
        name: Name of the category.
        price: Price of its cheapest articles.
        nouns: English -> Arabic words for its articles.
        materials: English -> Arabic words for their materials, flavours or scents, the dearest
            first.
    """

    name: str
    price: int
    nouns: Mapping[str, str]
    materials: Mapping[str, str]


_JEWELLERY = {"gold": "ذهب", "silver": "فضة", "pearl": "لؤلؤ", "diamond": "ألماس"}
_CLOTH = {"cotton": "قطن", "linen": "كتان", "silk": "حرير", "wool": "صوف"}
_LEATHER = {"leather": "جلد", "suede": "شمواه", "canvas": "قماش"}
_SCENTS = {"oud": "عود", "musk": "مسك", "rose": "ورد", "amber": "عنبر"}
# Some words are as shops write them, from English, and not as dictionaries do.
_WATCHES = {"steel": "ستيل", "gold": "ذهب", "leather": "جلد"}
_CASES = {"silicone": "سيليكون", "leather": "جلد", "carbon fibre": "كربون"}
_COOKWARE = {"steel": "ستانلس", "copper": "نحاس", "granite": "جرانيت"}
_TABLEWARE = {"porcelain": "بورسلان", "glass": "زجاج", "ceramic": "سيراميك"}
_WOODS = {"oak": "بلوط", "walnut": "جوز", "bamboo": "خيزران"}
_TOYS = {"wood": "خشب", "fabric": "قماش", "rubber": "مطاط"}

CATEGORIES: tuple[Category, ...] = (
    Category(
        name="rings",
        price=90,
        nouns={"ring": "خاتم", "wedding ring": "دبلة"},
        materials=_JEWELLERY,
    ),
    Category(
        name="necklaces",
        price=150,
        nouns={"necklace": "سلسال", "pendant": "تعليقة", "choker": "طوق"},
        materials=_JEWELLERY,
    ),
    Category(
        name="earrings",
        price=70,
        nouns={"earrings": "حلق", "hoops": "قرط"},
        materials=_JEWELLERY,
    ),
    Category(
        name="bracelets",
        price=110,
        nouns={"bracelet": "سوار", "anklet": "خلخال"},
        materials=_JEWELLERY,
    ),
    Category(
        name="watches",
        price=120,
        nouns={"watch": "ساعة", "chronograph": "ساعة كرونو"},
        materials=_WATCHES,
    ),
    Category(
        name="abayas",
        price=60,
        nouns={"abaya": "عباية", "open abaya": "عباية مفتوحة"},
        materials={"crepe": "كريب", "silk": "حرير", "linen": "كتان", "chiffon": "شيفون"},
    ),
    Category(
        name="dresses",
        price=45,
        nouns={"dress": "فستان", "jalabiya": "جلابية", "kaftan": "قفطان"},
        materials=_CLOTH,
    ),
    Category(
        name="thobes",
        price=40,
        nouns={"thobe": "ثوب", "vest": "سديري"},
        materials=_CLOTH,
    ),
    Category(
        name="shirts",
        price=18,
        nouns={"shirt": "قميص", "t-shirt": "تيشيرت", "polo shirt": "بولو"},
        materials=_CLOTH,
    ),
    Category(
        name="trousers",
        price=25,
        nouns={"trousers": "بنطلون", "shorts": "شورت"},
        materials={"denim": "جينز", "cotton": "قطن", "linen": "كتان"},
    ),
    Category(
        name="scarves",
        price=12,
        nouns={"scarf": "وشاح", "shawl": "شال", "hijab": "حجاب"},
        materials=_CLOTH,
    ),
    Category(
        name="sneakers",
        price=50,
        nouns={"sneakers": "حذاء رياضي", "running shoes": "حذاء جري"},
        materials={"mesh": "شبك", "leather": "جلد", "canvas": "قماش"},
    ),
    Category(
        name="sandals",
        price=22,
        nouns={"sandals": "صندل", "slippers": "شبشب"},
        materials=_LEATHER,
    ),
    Category(
        name="heels",
        price=48,
        nouns={"heels": "كعب", "wedges": "ويدج"},
        materials=_LEATHER,
    ),
    Category(
        name="handbags",
        price=65,
        nouns={"handbag": "حقيبة يد", "tote bag": "حقيبة كتف", "clutch": "كلتش"},
        materials=_LEATHER,
    ),
    Category(
        name="wallets",
        price=20,
        nouns={"wallet": "محفظة", "card holder": "حافظة بطاقات"},
        materials=_LEATHER,
    ),
    Category(
        name="sunglasses",
        price=35,
        nouns={"sunglasses": "نظارة شمسية"},
        materials={"metal": "معدن", "acetate": "أسيتات", "wood": "خشب"},
    ),
    Category(
        name="perfumes",
        price=45,
        nouns={"perfume": "عطر", "eau de parfum": "ماء عطر", "perfume oil": "دهن"},
        materials=_SCENTS,
    ),
    Category(
        name="incense",
        price=25,
        nouns={"incense": "بخور", "burner": "مبخرة"},
        materials=_SCENTS,
    ),
    Category(
        name="skincare",
        price=15,
        nouns={"face cream": "كريم وجه", "serum": "سيروم", "soap": "صابون"},
        materials={"argan": "أرغان", "honey": "عسل", "aloe": "صبار", "rose": "ورد"},
    ),
    Category(
        name="makeup",
        price=14,
        nouns={"lipstick": "روج", "mascara": "ماسكارا", "eye shadow": "ظلال عيون"},
        materials={"matte": "مات", "velvet": "مخمل", "pearl": "لؤلؤ"},
    ),
    Category(
        name="coffee",
        price=9,
        nouns={"coffee": "قهوة", "coffee beans": "بن"},
        materials={
            "cardamom": "هيل",
            "saffron": "زعفران",
            "Yemeni": "اليمن",
            "Ethiopian": "الحبشة",
        },
    ),
    Category(
        name="tea",
        price=6,
        nouns={"tea": "شاي", "tea bags": "أكياس شاي"},
        materials={"mint": "نعناع", "ginger": "زنجبيل", "hibiscus": "كركديه"},
    ),
    Category(
        name="dates",
        price=8,
        nouns={"dates": "تمر", "date box": "علبة تمر"},
        materials={"ajwa": "عجوة", "sukkari": "سكري", "medjool": "مجدول"},
    ),
    Category(
        name="chocolate",
        price=7,
        nouns={"chocolate": "شوكولاتة", "truffles": "ترافل"},
        materials={"pistachio": "فستق", "hazelnut": "بندق", "caramel": "كراميل"},
    ),
    Category(
        name="phone cases",
        price=10,
        nouns={"phone case": "غطاء جوال", "phone wallet": "محفظة جوال"},
        materials=_CASES,
    ),
    Category(
        name="chargers",
        price=14,
        nouns={"charger": "شاحن", "power bank": "بطارية متنقلة", "cable": "كيبل"},
        materials={"braided": "قماش", "magnetic": "مغناطيس", "solar": "طاقة شمسية"},
    ),
    Category(
        name="headphones",
        price=40,
        nouns={"headphones": "سماعة رأس", "earbuds": "سماعات أذن"},
        materials={"leather": "جلد", "silicone": "سيليكون", "steel": "ستيل"},
    ),
    Category(
        name="smart watches",
        price=80,
        nouns={"smart watch": "ساعة ذكية", "fitness band": "سوار رياضي"},
        materials=_CASES,
    ),
    Category(
        name="cookware",
        price=30,
        nouns={"pan": "مقلاة", "pot": "قدر", "tray": "صينية"},
        materials=_COOKWARE,
    ),
    Category(
        name="tableware",
        price=16,
        nouns={"plates": "صحون", "cups": "فناجين", "bowl": "زبدية"},
        materials=_TABLEWARE,
    ),
    Category(
        name="bedding",
        price=45,
        nouns={"sheets": "شراشف", "pillow": "مخدة", "blanket": "بطانية"},
        materials=_CLOTH,
    ),
    Category(
        name="rugs",
        price=75,
        nouns={"rug": "سجادة", "prayer mat": "سجادة صلاة"},
        materials={"wool": "صوف", "silk": "حرير", "jute": "خيش"},
    ),
    Category(
        name="lamps",
        price=28,
        nouns={"lamp": "مصباح", "lantern": "فانوس"},
        materials={"brass": "نحاس", "glass": "زجاج", "wood": "خشب"},
    ),
    Category(
        name="furniture",
        price=140,
        nouns={"table": "طاولة", "chair": "كرسي", "shelf": "رف"},
        materials=_WOODS,
    ),
    Category(
        name="toys",
        price=12,
        nouns={"blocks": "مكعبات", "puzzle": "أحجية", "doll": "دمية"},
        materials=_TOYS,
    ),
)

STYLES = {
    "classic": "كلاسيكي",
    "modern": "عصري",
    "luxury": "فاخر",
    "simple": "بسيط",
    "vintage": "قديم",
    "handmade": "يدوي",
}

BRANDS = {
    "Noor": "نور",
    "Zahra": "زهرة",
    "Layali": "ليالي",
    "Rimal": "رمال",
    "Sahar": "سحر",
    "Qamar": "قمر",
    "Yasmin": "ياسمين",
    "Dana": "دانة",
    "Marjan": "مرجان",
    "Nakhla": "نخلة",
    "Waha": "واحة",
    "Shams": "شمس",
    "Najd": "نجد",
    "Hijaz": "حجاز",
    "Andalus": "أندلس",
    "Petra": "بترا",
    "Cedar": "أرز",
    "Nile": "نيل",
    "Atlas": "أطلس",
    "Karma": "كرمة",
    "Safa": "صفا",
    "Rawda": "روضة",
    "Fajr": "فجر",
    "Badr": "بدر",
    "Suhail": "سهيل",
    "Thuraya": "ثريا",
    "Rihla": "رحلة",
    "Sanam": "سنام",
    "Liwan": "ليوان",
    "Mirsal": "مرسال",
}

# City -> code of its country.
CITIES = {
    "Riyadh": "SA",
    "Jeddah": "SA",
    "Dammam": "SA",
    "Dubai": "AE",
    "Abu Dhabi": "AE",
    "Doha": "QA",
    "Kuwait City": "KW",
    "Muscat": "OM",
    "Manama": "BH",
    "Amman": "JO",
    "Beirut": "LB",
    "Cairo": "EG",
    "Alexandria": "EG",
    "Casablanca": "MA",
    "Tunis": "TN",
    "Algiers": "DZ",
    "Baghdad": "IQ",
    "Istanbul": "TR",
    "London": "GB",
    "Berlin": "DE",
}

AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
GENDERS = ("female", "male")

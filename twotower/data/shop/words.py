"""The vocabulary of the generated shop, in English and Arabic: categories, what they sell, brands
and places.

Arabic names join noun and material as the language does ("خاتم ذهب", a ring of gold), so that no
adjective has to agree.
"""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """One shelf: `price` is what its cheapest usual article costs, `nouns` and `materials` are
    (English, Arabic)."""

    name: str
    price: float
    nouns: tuple[tuple[str, str], ...]
    materials: tuple[tuple[str, str], ...]


_PRECIOUS = (("gold", "ذهب"), ("silver", "فضة"), ("pearl", "لؤلؤ"), ("diamond", "ألماس"))
_CLOTH = (("cotton", "قطن"), ("linen", "كتان"), ("silk", "حرير"), ("wool", "صوف"))
_HIDE = (("leather", "جلد"), ("suede", "شمواه"), ("canvas", "قماش"))
_SCENT = (("oud", "عود"), ("musk", "مسك"), ("rose", "ورد"), ("amber", "عنبر"))
_WATCH = (("steel", "ستيل"), ("gold", "ذهب"), ("leather", "جلد"))
_CASE = (("silicone", "سيليكون"), ("leather", "جلد"), ("carbon fibre", "كربون"))
_KITCHEN = (("steel", "ستانلس"), ("copper", "نحاس"), ("granite", "جرانيت"))
_TABLE = (("porcelain", "بورسلان"), ("glass", "زجاج"), ("ceramic", "سيراميك"))
_WOOD = (("oak", "بلوط"), ("walnut", "جوز"), ("bamboo", "خيزران"))
_PLASTIC = (("wood", "خشب"), ("fabric", "قماش"), ("rubber", "مطاط"))

CATEGORIES: tuple[Category, ...] = (
    Category("rings", 90, (("ring", "خاتم"), ("wedding ring", "دبلة")), _PRECIOUS),
    Category(
        "necklaces",
        150,
        (("necklace", "سلسال"), ("pendant", "تعليقة"), ("choker", "طوق")),
        _PRECIOUS,
    ),
    Category("earrings", 70, (("earrings", "حلق"), ("hoops", "قرط")), _PRECIOUS),
    Category("bracelets", 110, (("bracelet", "سوار"), ("anklet", "خلخال")), _PRECIOUS),
    Category("watches", 120, (("watch", "ساعة"), ("chronograph", "ساعة كرونو")), _WATCH),
    Category(
        "abayas",
        60,
        (("abaya", "عباية"), ("open abaya", "عباية مفتوحة")),
        (("crepe", "كريب"), ("silk", "حرير"), ("linen", "كتان"), ("chiffon", "شيفون")),
    ),
    Category(
        "dresses", 45, (("dress", "فستان"), ("jalabiya", "جلابية"), ("kaftan", "قفطان")), _CLOTH
    ),
    Category("thobes", 40, (("thobe", "ثوب"), ("vest", "سديري")), _CLOTH),
    Category(
        "shirts", 18, (("shirt", "قميص"), ("t-shirt", "تيشيرت"), ("polo shirt", "بولو")), _CLOTH
    ),
    Category(
        "trousers",
        25,
        (("trousers", "بنطلون"), ("shorts", "شورت")),
        (("denim", "جينز"), ("cotton", "قطن"), ("linen", "كتان")),
    ),
    Category("scarves", 12, (("scarf", "وشاح"), ("shawl", "شال"), ("hijab", "حجاب")), _CLOTH),
    Category(
        "sneakers",
        50,
        (("sneakers", "حذاء رياضي"), ("running shoes", "حذاء جري")),
        (("mesh", "شبك"), ("leather", "جلد"), ("canvas", "قماش")),
    ),
    Category("sandals", 22, (("sandals", "صندل"), ("slippers", "شبشب")), _HIDE),
    Category("heels", 48, (("heels", "كعب"), ("wedges", "ويدج")), _HIDE),
    Category(
        "handbags",
        65,
        (("handbag", "حقيبة يد"), ("tote bag", "حقيبة كتف"), ("clutch", "كلتش")),
        _HIDE,
    ),
    Category("wallets", 20, (("wallet", "محفظة"), ("card holder", "حافظة بطاقات")), _HIDE),
    Category(
        "sunglasses",
        35,
        (("sunglasses", "نظارة شمسية"),),
        (("metal", "معدن"), ("acetate", "أسيتات"), ("wood", "خشب")),
    ),
    Category(
        "perfumes",
        45,
        (("perfume", "عطر"), ("eau de parfum", "ماء عطر"), ("perfume oil", "دهن")),
        _SCENT,
    ),
    Category("incense", 25, (("incense", "بخور"), ("burner", "مبخرة")), _SCENT),
    Category(
        "skincare",
        15,
        (("face cream", "كريم وجه"), ("serum", "سيروم"), ("soap", "صابون")),
        (("argan", "أرغان"), ("honey", "عسل"), ("aloe", "صبار"), ("rose", "ورد")),
    ),
    Category(
        "makeup",
        14,
        (("lipstick", "روج"), ("mascara", "ماسكارا"), ("eye shadow", "ظلال عيون")),
        (("matte", "مات"), ("velvet", "مخمل"), ("pearl", "لؤلؤ")),
    ),
    Category(
        "coffee",
        9,
        (("coffee", "قهوة"), ("coffee beans", "بن")),
        (("cardamom", "هيل"), ("saffron", "زعفران"), ("Yemeni", "اليمن"), ("Ethiopian", "الحبشة")),
    ),
    Category(
        "tea",
        6,
        (("tea", "شاي"), ("tea bags", "أكياس شاي")),
        (("mint", "نعناع"), ("ginger", "زنجبيل"), ("hibiscus", "كركديه")),
    ),
    Category(
        "dates",
        8,
        (("dates", "تمر"), ("date box", "علبة تمر")),
        (("ajwa", "عجوة"), ("sukkari", "سكري"), ("medjool", "مجدول")),
    ),
    Category(
        "chocolate",
        7,
        (("chocolate", "شوكولاتة"), ("truffles", "ترافل")),
        (("pistachio", "فستق"), ("hazelnut", "بندق"), ("caramel", "كراميل")),
    ),
    Category(
        "phone cases", 10, (("phone case", "غطاء جوال"), ("phone wallet", "محفظة جوال")), _CASE
    ),
    Category(
        "chargers",
        14,
        (("charger", "شاحن"), ("power bank", "بطارية متنقلة"), ("cable", "كيبل")),
        (("braided", "قماش"), ("magnetic", "مغناطيس"), ("solar", "طاقة شمسية")),
    ),
    Category(
        "headphones",
        40,
        (("headphones", "سماعة رأس"), ("earbuds", "سماعات أذن")),
        (("leather", "جلد"), ("silicone", "سيليكون"), ("steel", "ستيل")),
    ),
    Category(
        "smart watches", 80, (("smart watch", "ساعة ذكية"), ("fitness band", "سوار رياضي")), _CASE
    ),
    Category("cookware", 30, (("pan", "مقلاة"), ("pot", "قدر"), ("tray", "صينية")), _KITCHEN),
    Category("tableware", 16, (("plates", "صحون"), ("cups", "فناجين"), ("bowl", "زبدية")), _TABLE),
    Category(
        "bedding", 45, (("sheets", "شراشف"), ("pillow", "مخدة"), ("blanket", "بطانية")), _CLOTH
    ),
    Category(
        "rugs",
        75,
        (("rug", "سجادة"), ("prayer mat", "سجادة صلاة")),
        (("wool", "صوف"), ("silk", "حرير"), ("jute", "خيش")),
    ),
    Category(
        "lamps",
        28,
        (("lamp", "مصباح"), ("lantern", "فانوس")),
        (("brass", "نحاس"), ("glass", "زجاج"), ("wood", "خشب")),
    ),
    Category("furniture", 140, (("table", "طاولة"), ("chair", "كرسي"), ("shelf", "رف")), _WOOD),
    Category("toys", 12, (("blocks", "مكعبات"), ("puzzle", "أحجية"), ("doll", "دمية")), _PLASTIC),
)

STYLES = (
    ("classic", "كلاسيكي"),
    ("modern", "عصري"),
    ("luxury", "فاخر"),
    ("simple", "بسيط"),
    ("vintage", "قديم"),
    ("handmade", "يدوي"),
)

BRANDS = (
    ("Noor", "نور"),
    ("Zahra", "زهرة"),
    ("Layali", "ليالي"),
    ("Rimal", "رمال"),
    ("Sahar", "سحر"),
    ("Qamar", "قمر"),
    ("Yasmin", "ياسمين"),
    ("Dana", "دانة"),
    ("Marjan", "مرجان"),
    ("Nakhla", "نخلة"),
    ("Waha", "واحة"),
    ("Shams", "شمس"),
    ("Najd", "نجد"),
    ("Hijaz", "حجاز"),
    ("Andalus", "أندلس"),
    ("Petra", "بترا"),
    ("Cedar", "أرز"),
    ("Nile", "نيل"),
    ("Atlas", "أطلس"),
    ("Karma", "كرمة"),
    ("Safa", "صفا"),
    ("Rawda", "روضة"),
    ("Fajr", "فجر"),
    ("Badr", "بدر"),
    ("Suhail", "سهيل"),
    ("Thuraya", "ثريا"),
    ("Rihla", "رحلة"),
    ("Sanam", "سنام"),
    ("Liwan", "ليوان"),
    ("Mirsal", "مرسال"),
)

CITIES = (
    ("Riyadh", "SA"),
    ("Jeddah", "SA"),
    ("Dammam", "SA"),
    ("Dubai", "AE"),
    ("Abu Dhabi", "AE"),
    ("Doha", "QA"),
    ("Kuwait City", "KW"),
    ("Muscat", "OM"),
    ("Manama", "BH"),
    ("Amman", "JO"),
    ("Beirut", "LB"),
    ("Cairo", "EG"),
    ("Alexandria", "EG"),
    ("Casablanca", "MA"),
    ("Tunis", "TN"),
    ("Algiers", "DZ"),
    ("Baghdad", "IQ"),
    ("Istanbul", "TR"),
    ("London", "GB"),
    ("Berlin", "DE"),
)

AGE_GROUPS = ("18-24", "25-34", "35-44", "45-54", "55-64", "65+")
GENDERS = ("female", "male")

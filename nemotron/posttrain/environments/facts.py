"""Small tables of facts, from which questions with options are made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A question about pairs; subjects and values are each unique within it."""

    question: str
    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, question: str, table: str) -> "Relation":
        """Read `subject: value` entries, which semicolons separate."""
        entries = (entry.strip().split(": ") for entry in table.split(";"))
        return cls(question, tuple((subject, value) for subject, value in entries))

    @property
    def turned(self) -> tuple[tuple[str, str], ...]:
        """The pairs with value and subject exchanged."""
        return tuple((value, subject) for subject, value in self.pairs)


CAPITALS = Relation.read(
    "What is the capital of {}?",
    """Austria: Vienna; Belgium: Brussels; Bulgaria: Sofia; Croatia: Zagreb; Denmark: Copenhagen;
    Egypt: Cairo; Estonia: Tallinn; Finland: Helsinki; France: Paris; Germany: Berlin;
    Greece: Athens; Hungary: Budapest; Iceland: Reykjavik; India: New Delhi; Ireland: Dublin;
    Italy: Rome; Japan: Tokyo; Kenya: Nairobi; Latvia: Riga; Lithuania: Vilnius; Morocco: Rabat;
    Norway: Oslo; Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Romania: Bucharest;
    Serbia: Belgrade; Slovakia: Bratislava; Slovenia: Ljubljana; Spain: Madrid;
    Sweden: Stockholm; Thailand: Bangkok; Uruguay: Montevideo; Vietnam: Hanoi""",
)
SYMBOLS = Relation.read(
    "What is the chemical symbol of {}?",
    """hydrogen: H; helium: He; lithium: Li; beryllium: Be; boron: B; carbon: C; nitrogen: N;
    oxygen: O; fluorine: F; neon: Ne; sodium: Na; magnesium: Mg; aluminium: Al; silicon: Si;
    phosphorus: P; sulfur: S; chlorine: Cl; argon: Ar; potassium: K; calcium: Ca; iron: Fe;
    copper: Cu; zinc: Zn; silver: Ag; tin: Sn; gold: Au; mercury: Hg; lead: Pb; tungsten: W""",
)
ROMAN = Relation.read(
    "How is {} written as a Roman numeral?",
    """4: IV; 6: VI; 9: IX; 11: XI; 14: XIV; 19: XIX; 24: XXIV; 29: XXIX; 40: XL; 44: XLIV;
    49: XLIX; 60: LX; 61: LXI; 90: XC; 94: XCIV; 99: XCIX; 110: CX; 400: CD; 600: DC; 900: CM;
    1100: MC""",
)
UNITS = Relation.read(
    "Which quantity is measured in {}?",
    """newtons: force; joules: energy; watts: power; pascals: pressure; volts: electric potential;
    amperes: electric current; ohms: electric resistance; farads: capacitance;
    henries: inductance; teslas: magnetic flux density; kelvins: temperature; hertz: frequency;
    coulombs: electric charge; candelas: luminous intensity; moles: amount of substance""",
)
YEARS = Relation.read(
    "Which number of days belongs to {}?",
    """one week: 7; two weeks: 14; the month of April: 30; the month of May: 31; a leap year: 366;
    a common year: 365; February of a leap year: 29; February of a common year: 28;
    ten weeks: 70; twenty weeks: 140""",
)
RELATIONS = (
    CAPITALS,
    SYMBOLS,
    ROMAN,
    UNITS,
    YEARS,
    Relation("Of which country is {} the capital?", CAPITALS.turned),
    Relation("Which element has the chemical symbol {}?", SYMBOLS.turned),
    Relation("Which number is the Roman numeral {}?", ROMAN.turned),
)

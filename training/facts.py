"""The few facts that nano knows, in the languages it can be asked to answer in."""

from __future__ import annotations

LANGUAGES = ("English", "German", "French", "Spanish")

_CAPITALS = """
France|Paris|Frankreich|Paris|la France|Paris|Francia|París
Germany|Berlin|Deutschland|Berlin|l'Allemagne|Berlin|Alemania|Berlín
Italy|Rome|Italien|Rom|l'Italie|Rome|Italia|Roma
Spain|Madrid|Spanien|Madrid|l'Espagne|Madrid|España|Madrid
Portugal|Lisbon|Portugal|Lissabon|le Portugal|Lisbonne|Portugal|Lisboa
Austria|Vienna|Österreich|Wien|l'Autriche|Vienne|Austria|Viena
Switzerland|Bern|der Schweiz|Bern|la Suisse|Berne|Suiza|Berna
Belgium|Brussels|Belgien|Brüssel|la Belgique|Bruxelles|Bélgica|Bruselas
Poland|Warsaw|Polen|Warschau|la Pologne|Varsovie|Polonia|Varsovia
Norway|Oslo|Norwegen|Oslo|la Norvège|Oslo|Noruega|Oslo
Sweden|Stockholm|Schweden|Stockholm|la Suède|Stockholm|Suecia|Estocolmo
Finland|Helsinki|Finnland|Helsinki|la Finlande|Helsinki|Finlandia|Helsinki
Denmark|Copenhagen|Dänemark|Kopenhagen|le Danemark|Copenhague|Dinamarca|Copenhague
Iceland|Reykjavik|Island|Reykjavik|l'Islande|Reykjavik|Islandia|Reikiavik
Ireland|Dublin|Irland|Dublin|l'Irlande|Dublin|Irlanda|Dublín
Greece|Athens|Griechenland|Athen|la Grèce|Athènes|Grecia|Atenas
Turkey|Ankara|der Türkei|Ankara|la Turquie|Ankara|Turquía|Ankara
Russia|Moscow|Russland|Moskau|la Russie|Moscou|Rusia|Moscú
Ukraine|Kyiv|der Ukraine|Kiew|l'Ukraine|Kiev|Ucrania|Kiev
Hungary|Budapest|Ungarn|Budapest|la Hongrie|Budapest|Hungría|Budapest
Romania|Bucharest|Rumänien|Bukarest|la Roumanie|Bucarest|Rumania|Bucarest
Bulgaria|Sofia|Bulgarien|Sofia|la Bulgarie|Sofia|Bulgaria|Sofía
Croatia|Zagreb|Kroatien|Zagreb|la Croatie|Zagreb|Croacia|Zagreb
Japan|Tokyo|Japan|Tokio|le Japon|Tokyo|Japón|Tokio
China|Beijing|China|Peking|la Chine|Pékin|China|Pekín
India|New Delhi|Indien|Neu-Delhi|l'Inde|New Delhi|la India|Nueva Delhi
Thailand|Bangkok|Thailand|Bangkok|la Thaïlande|Bangkok|Tailandia|Bangkok
Vietnam|Hanoi|Vietnam|Hanoi|le Vietnam|Hanoï|Vietnam|Hanói
Canada|Ottawa|Kanada|Ottawa|le Canada|Ottawa|Canadá|Ottawa
Mexico|Mexico City|Mexiko|Mexiko-Stadt|le Mexique|Mexico|México|Ciudad de México
Cuba|Havana|Kuba|Havanna|Cuba|La Havane|Cuba|La Habana
Brazil|Brasilia|Brasilien|Brasilia|le Brésil|Brasilia|Brasil|Brasilia
Argentina|Buenos Aires|Argentinien|Buenos Aires|l'Argentine|Buenos Aires|Argentina|Buenos Aires
Chile|Santiago|Chile|Santiago|le Chili|Santiago|Chile|Santiago
Peru|Lima|Peru|Lima|le Pérou|Lima|Perú|Lima
Colombia|Bogota|Kolumbien|Bogotá|la Colombie|Bogota|Colombia|Bogotá
Egypt|Cairo|Ägypten|Kairo|l'Égypte|Le Caire|Egipto|El Cairo
Kenya|Nairobi|Kenia|Nairobi|le Kenya|Nairobi|Kenia|Nairobi
Morocco|Rabat|Marokko|Rabat|le Maroc|Rabat|Marruecos|Rabat
Australia|Canberra|Australien|Canberra|l'Australie|Canberra|Australia|Canberra
"""

_ROWS = [line.split("|") for line in _CAPITALS.strip().splitlines()]
COUNTRIES = tuple(row[0] for row in _ROWS)
COUNTRY_IN = {
    language: {row[0]: row[2 * i] for row in _ROWS} for i, language in enumerate(LANGUAGES)
}
CAPITAL_IN = {
    language: {row[0]: row[2 * i + 1] for row in _ROWS} for i, language in enumerate(LANGUAGES)
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
    "tenth", "eleventh", "twelfth",
)  # fmt: skip


def french_of(country_with_article: str) -> str:
    """`de` contracted with the article: "la France" to "de la France", "le Chili" to "du Chili"."""
    if country_with_article.startswith("le "):
        return "du " + country_with_article[3:]
    return "de " + country_with_article

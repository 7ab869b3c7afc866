from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.data.decode import decode
from trimtab.errors import DataError

JAPANESE = (
    "<html><body><p>港の渡し船は一九七四年に建造され、二百四十人の乗客を運ぶことができます。</p><p>船長の名前は田中です。</p></body></html>"
)
SPOKEN = {
    "cp1252": "Le café est fermé à midi — à côté de l’église.",
    "koi8-r": "Привет, как дела? Паром построен в семьдесят четвёртом году.",
    "cp1251": "Паром построен в семьдесят четвёртом году и назван в честь города.",
    "gb18030": "这艘渡轮建造于一九七四年，可以搭载二百四十名乘客。船长姓王。",
    "cp949": "이 배는 1974년에 건조되었습니다. 선장은 김씨입니다.",
    "cp1250": "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "cp1253": "Η γρήγορη καφέ αλεπού πηδά πάνω από το τεμπέλικο σκυλί.",
    "big5": "這艘渡輪建造於一九七四年，可以搭載二百四十名乘客。",
}


@pytest.mark.parametrize("header", [None, "utf-8", "shift_jis", "iso-8859-1", "no-such-encoding", "hex", "idna", "unicode_escape"])
@pytest.mark.parametrize("encoding", ["shift_jis", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "iso2022_jp"])
def test_japanese_whatever_the_header_says(encoding: str, header: str | None):
    assert decode(JAPANESE.encode(encoding), header_charset=header).text == JAPANESE


@pytest.mark.parametrize(("encoding", "text"), SPOKEN.items())
def test_undeclared_encodings_are_detected(encoding: str, text: str):
    assert decode(f"<p>{text}</p>".encode(encoding)).text == f"<p>{text}</p>"


@pytest.mark.parametrize(("encoding", "text"), SPOKEN.items())
def test_declared_in_the_page_or_in_the_header(encoding: str, text: str):
    assert text in decode(f'<meta charset="{encoding}"><p>{text}</p>'.encode(encoding)).text
    assert text in decode(f"<p>{text}</p>".encode(encoding), header_charset=encoding).text


def test_utf_8_beats_a_one_byte_encoding_that_reads_everything():
    assert decode("naïve café".encode(), header_charset="ISO-8859-1").text == "naïve café"


def test_latin_1_means_windows_1252():
    assert decode(b"\x93quoted\x94 \x80", header_charset="latin1").text == "“quoted” €"


def test_a_stray_byte_in_utf_8_does_not_change_the_encoding():
    text = "Die Fähre fährt täglich über den großen Fluß. " * 20
    decoded = decode(text.encode() + b"\xe9 end")
    assert decoded.encoding == "utf-8"
    assert decoded.text == text + "\ufffd end"


def test_line_ends_become_newlines():
    assert decode(b"a\r\nb\rc\n").text == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"%PDF-1.7 text text", "a PDF file"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"PK\x03\x04 docx", "a zip archive or an office document"),
        (b"\x1f\x8b\x08\x00", "a gzip file"),
        (random.Random(7).randbytes(4000), "binary data"),
        (bytes(200), "binary data"),
        (b"<html>" + random.Random(8).randbytes(4000), "binary data"),
    ],
)
@pytest.mark.parametrize("header", [None, "utf-8", "windows-1252", "shift_jis", "utf-16"])
def test_binary_is_told_from_text(body: bytes, kind: str, header: str | None):
    with pytest.raises(DataError, match=f"it is {kind}"):
        decode(body, header_charset=header)


@settings(deadline=None)
@given(st.binary(max_size=300), st.none() | st.sampled_from(["utf-8", "shift_jis", "utf-16", "gb2312", "rot13", "", "utf-7", "\0"]))
def test_any_bytes_are_text_or_a_dataerror(body: bytes, header: str | None):
    try:
        text = decode(body, header_charset=header).text
    except DataError:
        return
    assert "\r" not in text
    assert len(text) <= len(body)

"""Enron mail: invented messages in the shape of the maildir tree, its tar.gz and emails.csv."""

from __future__ import annotations

import csv
import io
import random
import tarfile
from pathlib import Path

import pytest

from megaegpt.data.readers import inputs
from megaegpt.errors import DataError
from tests.data.readers.reading import read, read_skipping, texts

HEADERS = (
    "Message-ID: <1.2.JavaMail.evans@thyme>\n"
    "Date: Mon, 14 May 2001 16:39:00 -0700 (PDT)\n"
    "From: k..example@enron.invalid\n"
    "To: a@enron.invalid, b@enron.invalid, \n\tc@enron.invalid\n"
    "Subject: Lunch of the US Olympic Commit\n\ttee 7.16\n"
    "Mime-Version: 1.0\n"
    "Content-Type: text/plain; charset=us-ascii\n"
    "Content-Transfer-Encoding: 7bit\n"
    "X-From: Example, Kay K. </O=ENRON/OU=NA/CN=RECIPIENTS/CN=KEXAMPLE>\n"
    "X-To: '\"JOE SAMPLE\" <joe@ENRON'\n"
    "X-Folder: \\Kay_Example_Jan2002_1\\Example, Kay K.\\'Sent Mail\n"
    "X-FileName: kexample (Non-Privileged).pst\n"
)


def message(body: str, headers: str = HEADERS) -> str:
    return f"{headers}\n{body}"


def put(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_tree_is_walked_whatever_the_names_and_duplicates_are_dropped(tmp_path: Path) -> None:
    maildir = tmp_path / "maildir"
    put(maildir, "example-k/inbox/10.", message("ten"))
    put(maildir, "example-k/inbox/2.", message("two"))
    put(maildir, "example-k/inbox/nested/3_", message("three"))
    put(maildir, "example-k/all_documents/7.", message("two\n", HEADERS.replace("1.2", "9.9")))
    put(maildir, "example-k/contacts/1.", message("Joe's telephone"))
    put(maildir, "example-k/inbox/4.", message(" \n"))
    put(maildir, "example-k/inbox/.DS_Store", b"\0\1")
    assert texts(read("enron", maildir)) == ["two", "ten", "three"]
    assert len(read("enron", maildir, keep_duplicates=True)) == 4


def test_folded_headers_are_joined_even_inside_a_word(tmp_path: Path) -> None:
    [document] = read("enron", put(tmp_path, "1.", message("body")))
    assert document.metadata == {
        "subject": "Lunch of the US Olympic Committee 7.16",
        "from": "k..example@enron.invalid",
        "date": "Mon, 14 May 2001 16:39:00 -0700 (PDT)",
    }


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"caf\xe9 it\x92s", "café it\u2019s"),
        ("café".encode(), "café"),
        (b"undefined \x81", "undefined \ufffd"),
        (b"a\r\nb\r\n", "a\nb"),
        (b"left =20 alone=\n", "left =20 alone="),
    ],
)
def test_bodies_in_undeclared_encodings(tmp_path: Path, raw: bytes, text: str) -> None:
    path = put(tmp_path, "1.", HEADERS.encode() + b"\n" + raw)
    assert texts(read("enron", path)) == [text]


def test_quoted_printable_is_undone_only_where_it_is_declared(tmp_path: Path) -> None:
    headers = HEADERS.replace("7bit", "quoted-printable").replace("\n", "\r\n")
    path = put(tmp_path, "1.", f"{headers}\r\ncaf=E9 at=20noon, soft=\r\nly\r\n")
    assert texts(read("enron", path)) == ["café at noon, softly"]


@pytest.mark.parametrize(
    "history",
    [
        " -----Original Message-----\nFrom: \tJoe\nSent:\tFriday\nTo:\tKay\nSubject:\tx\n\nold\n",
        "---------------------- Forwarded by Joe Sample/HOU/ECT on 05/14/2001 04:39 PM "
        "---------------------------\n\nold\n",
        "Joe Sample@ECT\n05/14/2001 04:39 PM\nTo: Kay Example/HOU/ECT@ECT\ncc: \nSubject: x\n\nold",
        "> old\n> older\n",
    ],
)
def test_quoted_history_is_cut_or_kept(tmp_path: Path, history: str) -> None:
    path = put(tmp_path, "1.", message(f"Yes. - plan.xls\n\n{history}"))
    assert texts(read("enron", path)) == ["Yes. - plan.xls"]
    assert texts(read("enron", path, keep_quoted=True)) == [
        f"Yes. - plan.xls\n\n{history.rstrip()}"
    ]


def write_csv(path: Path, *rows: tuple[str, str]) -> Path:
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([("file", "message"), *rows])
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    return path


def test_emails_csv_with_a_long_message_and_contacts(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "emails.csv",
        ("example-k/_sent_mail/1.", message('He said "no", é,\nand left.')),
        ("example-k/contacts/2.", message("Joe's telephone")),
        ("example-k/inbox/3.", message("word " * 50_000)),
    )
    first, second = read("enron", path)
    assert first.text == 'He said "no", é,\nand left.'
    assert first.position == "row 1 (example-k/_sent_mail/1.)"
    assert len(second.text) == 249_999


def test_the_archive_is_read_without_extracting_it(tmp_path: Path) -> None:
    path = tmp_path / "enron_mail.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("maildir/example-k/inbox/1.", "../../../evil/2.", "maildir/x/contacts/3."):
            data = message(name).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    documents = read("enron", path)
    assert texts(documents) == ["maildir/example-k/inbox/1.", "../../../evil/2."]
    assert documents[0].where == f"{path}, maildir/example-k/inbox/1."
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"no mail at all\n\nbody", b"\x89PNG\r\n\x1a\n\0\0"])
def test_what_is_no_message_is_named_or_counted(tmp_path: Path, content: bytes) -> None:
    path = put(tmp_path, "5.", content)
    with pytest.raises(DataError, match=r"5\.: not a mail message"):
        read("enron", path)
    documents, problems = read_skipping("enron", put(tmp_path, "4.", message("good")), path)
    assert (texts(documents), problems.count) == (["good"], 1)


def archive_of(path: Path, *bodies: str) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for number, body in enumerate(bodies):
            data = message(body).encode()
            member = tarfile.TarInfo(f"maildir/example-k/inbox/{number}.")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def test_a_truncated_archive_is_named_or_counted(tmp_path: Path) -> None:
    noise = random.Random(1)
    bodies = ["".join(noise.choices("abcdefgh ", k=3000)).strip() for _ in range(30)]
    path = tmp_path / "enron_mail.tar.gz"
    whole = archive_of(path, *bodies)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"enron_mail\.tar\.gz.*truncated or damaged"):
        read("enron", path)
    documents, problems = read_skipping("enron", path)
    assert texts(documents) == bodies[: len(documents)]
    assert len(documents) > 5
    assert problems.count >= 1


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "EXPANSION_FREE_BYTES", 1 << 20)
    archive_of(tmp_path / "mail.tgz", "x" * (1 << 22))
    with pytest.raises(DataError, match="expands more than 100-fold"):
        read("enron", tmp_path / "mail.tgz")


def test_contacts_and_calendars_are_counted_as_left_out(tmp_path: Path) -> None:
    put(tmp_path, "allen-p/inbox/1.", message("Mail."))
    put(tmp_path, "allen-p/calendar/1.", message("Meeting."))
    documents, problems = read_skipping("enron", tmp_path)
    assert texts(documents) == ["Mail."]
    [line] = problems.left_out.lines()
    assert line.startswith("1 not read, contacts, calendars and tasks: ")

"""check.html: what the terminal says, in a browser, offline, on a screen as narrow as a telephone's."""

import dataclasses
import os
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import chromium
import pytest
from small_rig import write_project

from bkind3d import cli
from bkind3d.check import CheckReport, check_project
from bkind3d.check_rig import Finding
from bkind3d.data import load_project
from bkind3d.errors import InputError
from bkind3d.report.check_page import write_check_page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    """Of a rig with pictures, and a finding of each level; one of them holds markup."""
    folder = tmp_path_factory.mktemp("check")
    found = check_project(
        load_project(write_project(folder)), gap=1, voxels=4, out=folder / "out", height=48, width=64, foreground=True
    )
    findings = [Finding("green", "files: fine"), Finding("red", "camera '<b>x</b>': wrong")]
    return dataclasses.replace(found, findings=findings, warnings=["look at this first", "then at this"])


def test_the_page_says_what_the_terminal_says(report: CheckReport, tmp_path: Path) -> None:
    page = write_check_page(report, tmp_path / "new")
    assert page == tmp_path / "new" / "check.html"
    text = page.read_text()
    items = re.findall(r'<li class="(\w+)"><b>\1</b>(.*?)</li>', text)
    assert [(level, unescape(words)) for level, words in items] == [
        ("red", "camera '<b>x</b>': wrong"),
        ("amber", "look at this first"),
        ("amber", "then at this"),
        ("green", "files: fine"),
    ]
    assert "<b>x</b>" not in text
    assert "Something is wrong with this rig" in text
    cells = [unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", text)]
    rows = [*report.recording_rows(), *report.camera_rows(), *report.foreground_rows()]
    assert cells == [cell for row in rows for cell in row]
    for line in report.volume_lines():
        assert line in unescape(text)


@pytest.mark.parametrize(
    ("findings", "warnings", "words"),
    [
        ([], ["look"], "Nothing forbids training"),
        ([Finding("green", "fine"), Finding("grey", "not looked at")], [], "Nothing suspicious"),
    ],
)
def test_verdicts(
    report: CheckReport, findings: list[Finding], warnings: list[str], words: str, tmp_path: Path
) -> None:
    page = write_check_page(dataclasses.replace(report, findings=findings, warnings=warnings), tmp_path)
    assert words in page.read_text()


def test_a_page_that_cannot_be_written(report: CheckReport, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"check\.html: the page cannot be written \(Not a directory\)"):
        write_check_page(report, tmp_path / "file" / "out")


def test_the_command_writes_it_where_something_is_red_too(
    report: CheckReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "check_run", lambda project, config, out: report)
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(write_project(tmp_path)), "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert f"page: {tmp_path / 'out' / 'check.html'}" in capsys.readouterr().out
    assert (tmp_path / "out" / "check.html").exists()


@pytest.fixture(scope="module")
def browser(report: CheckReport, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.executable() is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("chromium is not on PATH: install it")
    page = write_check_page(report, tmp_path_factory.mktemp("page"))
    with chromium.Browser(tmp_path_factory.mktemp("chromium"), 900, 700) as browser:
        browser.open(page)
        yield browser


def test_browser_shows_it_offline(browser: chromium.Browser, report: CheckReport) -> None:
    assert browser.evaluate("document.images.length") == len(report.pictures) == 2 * len(report.cameras)
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert all(url.startswith("file:") for url in browser.requests())
    assert browser.faults() == []


def test_browser_fits_it_into_a_narrow_window(browser: chromium.Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390

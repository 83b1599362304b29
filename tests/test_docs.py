"""What the pages say can be run, runs; links lead somewhere, to the anchor; no line has more than 120 characters."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# Beside the code and the results: their links are checked as well.
FURTHER = [ROOT / "csrc/README.md", *sorted((ROOT / "benchmarks/results").glob("**/NOTES.md"))]
# The second block of the evaluation page opens a file that only a finished demo has.
EXAMPLES = [("README.md", 0), ("docs/evaluation.md", 0)]
LONGEST = 120

FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+(?:\n[^`\n]+)*`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the docs site name them."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(FENCE.sub("", text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def broken_links(page: Path) -> list[str]:
    """The links of a page to a file or an anchor that is not there; the web is not asked."""
    text = page.read_text()
    broken = []
    for target in LINK.findall(CODE.sub("", FENCE.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text()))):
            broken.append(target)
    return broken


def long_lines(text: str) -> list[str]:
    """The lines that are too long, but for the rows of tables."""
    return [line for line in text.splitlines() if len(line) > LONGEST and not line.startswith("|")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize(("page", "index"), EXAMPLES)
def test_example_runs(page: str, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[index]
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, *FURTHER], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [*PAGES, *FURTHER], ids=name_of)
def test_lines_are_short(page: Path) -> None:
    assert long_lines(page.read_text()) == []


@pytest.mark.parametrize(
    ("link", "holds"),
    [
        ("other.md", True),
        ("missing.md", False),
        ("other.md#on-cuda-112-voxels", True),
        ("other.md#twice-1", True),
        ("other.md#twice-2", False),
        ("other.md#on-cuda", False),
        ("other.md#a-comment-in-code", False),
        ("#own", True),
        ("#another", False),
        ("data.csv#own", False),
    ],
)
def test_a_planted_link_is_judged(tmp_path: Path, link: str, holds: bool) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "other.md").write_text(
        "# Other\n\n## On `cuda`: 112 [voxels](x.md)\n\n## Twice\n\n## Twice\n\n```bash\n# A comment in code\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(f"# Own\n\nSee [the\nother]({link}), `[not](a-link.md)`.\n\n```\n[nor](this.md)\n```\n")
    assert broken_links(page) == ([] if holds else [link])


def test_a_planted_line_is_too_long() -> None:
    text = "a" * LONGEST + "\n|" + "b" * LONGEST + "|\n" + "c" * (LONGEST + 1)
    assert long_lines(text) == ["c" * (LONGEST + 1)]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_on_the_map_exist(page: str) -> None:
    """The files that the map names, from the root or from the folder of the file named before."""
    text = FENCE.sub("", (ROOT / page).read_text())
    absent, folder = [], ROOT
    for path in re.findall(r"`([\w/]+/[\w/.]*|\w+\.(?:py|cpp|h|cuh))(?::[^`]*)?`", text):
        here = [
            base / path for base in (ROOT, folder, *(ROOT / room for room in ("bkind3d", "bkind3d_kernels", "csrc")))
        ]
        found = next((file for file in here if file.exists()), None)
        if found is None:
            absent.append(path)
        else:
            folder = found if found.is_dir() else found.parent
    assert absent == []

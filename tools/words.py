"""Words that the documentation, the messages and the code of the project avoid; part of `make check`.

Prose is plain technical English (see CONTRIBUTING). `--count` prints the number of lines per word and never fails.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What to write instead, by the pattern to avoid; matched within one line, upper and lower case alike.
AVOID = {
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\bwhoever\b": "anyone who, the process that",
    r"\bis told\b|\bare told\b|\btold apart\b": "is reported, is distinguished",
    r"\bis as well\b|\bare as well\b|\bis well\b|\bare well\b": "also holds, is valid",
    r"\bat hand\b": "available",
    r"\bas for\b(?! (example|`))": "about, for",
    r"\bborne?\b": "carried, tolerated",
    r"\bleaves? nothing to\b": "(say it plainly)",
    r"\b(a|one) (row|line|file|fold|image|process|module|number|vector) (a|an) \w+": "one row per image",
    r"\bone a (fold|core|dataset|cell|repeat|line|label)\b": "one per fold",
    r"\b(images|rows|megabytes|seconds|ms) (a|an) (second|image|shard|fold|batch|epoch|step)\b": "images per second",
    r"\blabels to doubt\b": "likely label errors",
    r"\brightly predicted\b": "correctly predicted",
    r"\bthat there (is|are) not\b": "that does not exist",
    r"\bany beginning of\b|\bunique beginning\b": "a unique prefix",
    r"\b(says|say) so\b": "(say what)",
    r"\bfrom beginning to end\b": "completely",
    r"\bnobody'?s?\b": "no user, no process",
    r"\bsomebody\b|\banybody\b": "someone, a user",
    r"\bhands in\b|\bto hand in\b": "submit",
    r"\bin the manner of\b": "like",
    r"\bof one'?s own\b|\bone'?s own\b": "your own",
    r"\bbesides\b": "apart from, in addition to",
    r"\bneighbour|\bcolour|\bgrey\b|\bcentre\b|\blabelled\b|\bmodell(ed|ing)\b": "American spelling",
    r"\b\w+(al|t|ial|gn|ar|im)is(e|es|ed|ing)\b": "-ize",
    r"\blicence\b|\bbehaviour|\bfavour|\bartefact|\banalys(e|ed|es|ing)\b|isation(s|al)?\b": "American spelling",
}
# The same for prose alone: Markdown, and texts in code that are no docstrings, or are the help of a command.
PROSE = {
    r"\bwhose\b": "with, of which",
    r"\btold\b": "reported, known",
    r"\bbear(s|ing)?\b": "have, carry",
}
# Names of others, and the list itself.
SKIP = re.compile(r"^(CHANGELOG\.md|docs/log\.md|tools/words\.py|LICENSE)$")
# Spelled so by others: libraries, formats, papers, Kaggle.
ALLOWED = re.compile(
    r"otherwise|likewise|clockwise|exercise|promise|precise|concise|n_neighbours|torch\.nn\.init|\bGrey\b|greyscale|colour_?map|licence_url"
)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a page, or of the texts in a module of the package that users see."""
    text = path.read_text("utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
    if path.suffix != ".py" or "embcache" not in path.relative_to(ROOT).parts[:1]:
        return
    tree = ast.parse(text)
    unseen = {
        id(part.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for part in node.body
        if isinstance(part, ast.Expr)
        and not (isinstance(node, ast.FunctionDef) and node.decorator_list and path.parent.name == "commands")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in unseen:
            yield from enumerate(node.value.splitlines(), node.lineno)


def main() -> int:
    """Print every line with a word to avoid, and what to write instead."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.j2"], cwd=ROOT, capture_output=True, text=True)
    patterns = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in AVOID.items()}
    prose = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in PROSE.items()}
    counts: Counter[str] = Counter()
    for name in listed.stdout.split():
        if SKIP.match(name) or not (ROOT / name).is_file():
            continue
        lines = enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        checked = [(patterns, each) for each in lines] + [(prose, each) for each in texts(ROOT / name)]
        for avoided, (number, line) in checked:
            for pattern, instead in avoided.items():
                found = pattern.search(ALLOWED.sub("", line))
                if found:
                    counts[found[0].lower()] += 1
                    if "--count" not in sys.argv:
                        print(f"{name}:{number}: {found[0]!r}: {instead}")
    if "--count" in sys.argv:
        for word, count in counts.most_common():
            print(f"{count:>5}  {word}")
        print(f"{counts.total():>5}  in all")
        return 0
    return int(counts.total() > 0)


if __name__ == "__main__":
    sys.exit(main())

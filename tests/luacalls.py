"""Which commands the scripts call, and on which of a ring's keys, read off their text."""

import re
from pathlib import Path

import synthbroker
from synthbroker.line import script_text

FOLDER = Path(synthbroker.__file__).parent / "lua"
_FUNCTION = re.compile(r"^local function (\w+)\(", re.MULTILINE)
_CALL = re.compile(r"redis\.p?call\('(\w+)'(?:, '(\w+)')?((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
_CHUNKS = re.compile(r"in_chunks\('(\w+)'")
_SUBCOMMANDS = {"xinfo", "xgroup"}
# What stands for a key in the scripts: a ring's key, or where it is one of several, all of them.
_KEYS = {
    r"\bmeta_key": ["meta"],
    r"\bsamples_key": ["samples"],
    r"\bcopy\b": ["samples:copy"],
    r"\bindex_key": ["index"],
    r"\bleases_key": ["leases"],
    r"\bseqs_key": ["seqs"],
    r"\broom_key": ["room"],
    r"\bclosed_key": ["closed"],
    r"\bproducers_key(?! \.\.)|\bset\b": ["producers"],
    r"\bconsumers_key(?! \.\.)|\bset\b": ["consumers"],
    r"producers_key \.\. ':about'|'producers:about'|\bkey \.\. ':about'": ["producers:about"],
    r"consumers_key \.\. ':about'|'consumers:about'|\bkey \.\. ':about'": ["consumers:about"],
    r"\bquarantine_key": ["quarantine"],
    r"\bcontent_key(?! \.\.)": ["content"],
    r"\bold_key|content_key \.\. ':old'": ["content:old"],
    r"\btwins_key": ["twins"],
    r"\bgroup_key\(": ["group:*"],
    r"\buses_key\(": ["uses:*"],
    r"\brounds_key\(": ["rounds:*"],
    r"\bruns_key\(": ["runs:*"],
    r"\bevicted_key\(": ["evicted:*"],
    r"\bunsettled_key\(": ["unsettled:*"],
    r"prefix \.\. 'nothing'": ["nothing"],
    r", (?:name|part)$|\bnames\b|'part:'|sample\.names": ["part:*"],
}
_ON_PARTS = {"exists", "unlink", "pttl", "persist"}
_OWN_KEY = {"beat": ["producers", "consumers"], "seat": ["rounds:*"], "deal": ["rounds:*"], "settle": ["unsettled:*"]}


def calls_of(name: str) -> set[tuple[str, str]]:
    """List (command, key) that a script can come to, with `xinfo|groups` for subcommands and "" for no key.

    Functions that the script cannot reach are left out; branches are all taken.
    """
    blocks = _blocks(script_text(name)[0])
    reached, open_names = set[str](), {""}
    while open_names:
        one = open_names.pop()
        reached.add(one)
        words = set(re.findall(r"\w+", blocks[one]))
        open_names |= (words & set(blocks)) - reached
    found = set[tuple[str, str]]()
    for one in reached:
        found |= _calls(name, blocks[one])
    return found


def _blocks(text: str) -> dict[str, str]:
    """Cut a script into its functions, and under "" what is outside of them."""
    text = re.sub(r"--.*", "", text).replace("'('", "'<'")  # the parentheses that are left are calls
    blocks, outside = {}, []
    at = 0
    for match in _FUNCTION.finditer(text):
        if match.start() < at:
            continue
        line_end = text.find("\n", match.start())
        one_liner = re.search(r"\bend\s*$", text[match.start() : line_end])
        end = line_end if one_liner else text.find("\nend", match.start()) + 4
        outside.append(text[at : match.start()])
        blocks[match[1]] = text[match.end() : end]
        at = end
    blocks[""] = "".join([*outside, text[at:]])
    return blocks


def _calls(script: str, text: str) -> set[tuple[str, str]]:
    found = {(command, "part:*") for command in _CHUNKS.findall(text)}
    for command, word, arguments in _CALL.findall(text):
        name = f"{command}|{word}" if command in _SUBCOMMANDS else command
        rest = arguments if command in _ON_PARTS else arguments.replace("name", "")
        keys = [key for pattern, names in _KEYS.items() if re.search(pattern, rest) for key in names]
        if re.match(r"\s*,\s*key\b(?! \.\.)", rest):
            keys += _OWN_KEY.get(script, ["?"])
        if command == "time":
            keys = [""]
        found |= {(name, key) for key in keys or ["?"]}
    return found

"""`fxcompress completion`: a script by which the shell completes commands and options.

The script is made from the parser once and holds plain lists of words: asking the command itself at
every press of the key would import PyTorch each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

EXAMPLES = """\
examples:
  fxcompress completion bash > ~/.local/share/bash-completion/completions/fxcompress
  fxcompress completion zsh > ~/.fxcompress.zsh   # and in ~/.zshrc: source ~/.fxcompress.zsh
"""

_SCRIPT = """\
_fxcompress() {
    local current="${COMP_WORDS[COMP_CWORD]}" words=""
    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
CASES
    esac
    case "$COMP_CWORD ${COMP_WORDS[1]}" in
        1\\ *) words="COMMANDS" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -F _fxcompress fxcompress
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fxcompress completion`."""
    parser.add_argument("shell", choices=["bash", "zsh"])


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a whole command."""
    found = dict(_words(parser, ()))
    cases = [
        f'        "{path[0]} "*) words="{" ".join(words)}" ;;'
        if len(path) == 1
        else f'        "{path[0]} {path[1]}") words="{" ".join(words)}" ;;'
        # The longer pattern first: the shell takes the first that fits.
        for path, words in sorted(found.items(), key=lambda item: -len(item[0]))
        if path
    ]
    text = _SCRIPT.replace("CASES", "\n".join(cases)).replace("COMMANDS", " ".join(found[()]))
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _words(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """What may follow each (sub)command: its options, the choices of its arguments."""
    words: list[str] = []
    for action in parser._actions:
        words += [option for option in action.option_strings if option.startswith("--")]
        words += [] if action.choices is None else [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _words(command, (*path, name))
    yield path, words

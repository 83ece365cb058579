"""Prompt files: what is read, what is refused, and the order of the stream."""

from pathlib import Path

import pytest

from adagrpo_train.errors import CheckpointError, ConfigError, PromptError
from adagrpo_train.prompts.source import PromptFile, read_prompts


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_lines_keep_their_line_number_as_id(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.txt", "a cat\n\n  a dog  \n"))
    assert (prompts.ids, prompts.texts, prompts.classes) == ((0, 2), ("a cat", "a dog"), ("", ""))


def test_jsonl_lines_carry_a_class(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a cat", "class": "easy"}\n{"prompt": "a dog"}\n'))
    assert (prompts.texts, prompts.classes) == (("a cat", "a dog"), ("easy", ""))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.txt", b"caf\xe9", "not UTF-8"),
        ("p.jsonl", "a cat", "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2: expected an object"),
        ("p.jsonl", '{"prompt": " "}', "line 1: expected an object"),
        ("p.jsonl", '{"prompt": "a", "klass": "b"}', "unknown keys"),
    ],
)
def test_a_file_that_is_not_prompts_is_refused_with_the_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompts(write(tmp_path / name, content))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts.path=.*nowhere.txt: no such file"):
        read_prompts(tmp_path / "nowhere.txt")


def stream(tmp_path: Path, count: int = 10, seed: int = 0) -> PromptFile:
    return PromptFile(path=str(write(tmp_path / "p.txt", "\n".join(f"prompt {i}" for i in range(count)))), seed=seed)


def test_an_epoch_visits_every_prompt_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    source = stream(tmp_path)
    epochs = [source.next(5).ids + source.next(5).ids for _ in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_prompts_of_one_call_are_distinct_across_the_end_of_an_epoch(tmp_path: Path) -> None:
    source = stream(tmp_path)
    assert all(len(set(source.next(7).ids)) == 7 for _ in range(10))


def test_a_restored_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = stream(tmp_path), stream(tmp_path)
    first.next(4)
    second.load_state_dict(first.state_dict())
    assert [first.next(4).ids for _ in range(5)] == [second.next(4).ids for _ in range(5)]


def test_a_stream_of_another_file_is_not_continued(tmp_path: Path) -> None:
    state = stream(tmp_path, count=10).state_dict()
    with pytest.raises(CheckpointError, match="10 prompts"):
        stream(tmp_path, count=11).load_state_dict(state)


def test_more_prompts_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds only 10 prompts"):
        stream(tmp_path).next(11)

import pytest

from ldm_cli.errors import InputNotFoundError, UsageError
from ldm_cli.pictures.job import make_job
from ldm_cli.pictures.wildcards import Wildcards
from ldm_cli.sampling.config import SamplingConfig
from ldm_cli.sampling.edit_config import EditConfig


@pytest.fixture
def words(tmp_path):
    (tmp_path / "color.txt").write_text("# colours\nred\n\ngreen\nblue\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "secret").write_text("no")
    return Wildcards(tmp_path)


def test_words_depend_on_the_seed_and_the_place_alone(words):
    found = [words.fill_in("a __color__ and __color__", seed) for seed in range(60)]
    assert found == [words.fill_in("a __color__ and __color__", seed) for seed in range(60)]
    assert len(set(found)) == 9, "all pairs of three colours"
    assert found[5].split(" and ")[0] == words.fill_in("a __color__", 5)


def test_names_lead_nowhere_else(words):
    for text in ("__../secret__", "__/etc/passwd__", "a__b", "____", "__ color __"):
        assert words.fill_in(text, 0) == text


def test_missing_and_empty_lists_are_named(words, tmp_path):
    with pytest.raises(InputNotFoundError, match="__animal__"):
        words.fill_in("__animal__", 0)
    with pytest.raises(InputNotFoundError, match="is empty"):
        words.fill_in("__empty__", 0)
    with pytest.raises(InputNotFoundError, match="--wildcards"):
        Wildcards(tmp_path / "none")


def test_each_image_of_a_job_has_its_own_word(words):
    config = SamplingConfig(images_per_prompt=12)
    job = words.filled_in(make_job(["__color__"], config, EditConfig()))
    assert {item.request.prompt for item in job.items} == {"red", "green", "blue"}
    plain = make_job(["__color__"], config, EditConfig())
    assert {item.request.prompt for item in plain.items} == {"__color__"}, "off unless asked for"
    with pytest.raises(UsageError):
        make_job(["a"], config, EditConfig(), frames=2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_word_lists_are_read_in_any_usual_encoding(tmp_path, encoding):
    (tmp_path / "color.txt").write_bytes("señor roux\n".encode(encoding))
    assert Wildcards(tmp_path).fill_in("a __color__ cat", 0) == "a señor roux cat"


def test_a_link_in_the_folder_is_not_followed(words, tmp_path):
    (tmp_path / "users.txt").symlink_to("/etc/passwd")
    with pytest.raises(InputNotFoundError, match=r"users\.txt"):
        words.fill_in("a __users__", 0)


@pytest.mark.parametrize("variation", [0.0, 0.5])
@pytest.mark.parametrize("count", [100_001, 10**12, 2**63])
def test_a_job_of_too_many_pictures_is_refused_before_it_is_made(count, variation):
    with pytest.raises(UsageError, match="more than 100,000 pictures"):
        make_job(["a"], SamplingConfig(images_per_prompt=count), EditConfig(), variation=variation)
    with pytest.raises(UsageError, match="more than 100,000 pictures"):
        make_job(["a", "b"], SamplingConfig(images_per_prompt=2), EditConfig(), frames=count)

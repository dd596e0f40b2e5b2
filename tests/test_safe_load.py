import io
import zipfile

import pytest
import torch

from ebm_prior import EbmPriorError
from ebm_prior.safe_load import load_torch_file, sha256_of


def saved(**kwargs):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(64.0), "b": [1, "x"]}, buffer, **kwargs)
    return buffer.getvalue()


def test_a_compressed_file_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(io.BytesIO(saved())) as plain:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with pytest.raises(EbmPriorError, match="compressed"):
        load_torch_file(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_damage_anywhere_is_one_kind_of_error(tmp_path, new_format):
    data = saved(_use_new_zipfile_serialization=new_format)
    path, refused = tmp_path / "x.pt", 0
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (150,), generator=generator).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            load_torch_file(path)
        except EbmPriorError:
            refused += 1
    assert refused > 10


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
    hashes = set()
    for name, text in (("a", "1"), ("b", "1"), ("a", "2")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        hashes.add(sha256_of(folder))
    assert len(hashes) == 3

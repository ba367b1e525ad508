from typing import Any

from benchmarks.cache import main


def test_every_source_is_read_and_trained_on(capsys: Any) -> None:
    sizes = {"rows": 400, "width": 8, "batch_size": 32, "d_sae": 64, "shards": 3}
    lengths = {"batches": 4, "steps": 3, "turns": 1}
    main([f"--{name}={value}" for name, value in {**sizes, **lengths}.items()])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14] for line in lines[2:]] == [
        "rows in memory",
        "files, shuffle",
        "files, in piec",
    ]
    assert "100%" in lines[2]

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, in order; saved for real too."""
    saved = []
    save = Figure.savefig

    def savefig(self, path, **options):
        saved.append(self)
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved

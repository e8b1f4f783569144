"""Open defects of the backend, by the test that shows them: expected failures, to be mended and deleted here."""

KNOWN_DEFECTS: dict[str, str] = {}

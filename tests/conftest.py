"""Makes the helper modules beside this file importable from every test (pytest puts its directory on the path)."""

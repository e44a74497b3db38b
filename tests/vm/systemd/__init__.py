"""A guest whose process 1 is systemd, with what ``make install`` installs; see ../README.md."""

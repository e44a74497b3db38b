"""What the daemon says about injected stalls against what was really injected.

``python -m bench.fidelity --help``; the method is told in bench/README.md.
"""

# Everything a checkout needs. `make` alone lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# bcc belongs to the distribution's own interpreter; another one does not see it.
PYTHON ?= /usr/bin/python3
# Arguments for `make run` and `make test`.
ARGS ?=
# Where `make install` puts things, below DESTDIR.
PREFIX ?= /usr
LIBDIR = $(PREFIX)/lib/softirq-stalld
UNITDIR = /usr/lib/systemd/system
# Where it leaves the wheel that it made.
WHEELS ?= build/wheel

RUNTIME_PACKAGES := python3-bpfcc libbpf1 python3-venv
TEST_PACKAGES := clang-14 libbpf-dev linux-libc-dev bpftool iproute2 iputils-ping \
	libbpf-tools procps gcc libc6-dev systemd rsyslog rsyslog-openssl logrotate openssl
# Loads, and the tools that we are measured against.
BENCH_PACKAGES := linux-perf bpfcc-tools rt-tests stress-ng

# Only for test-vm. busybox-static: the guest's initramfs has no C library.
VM_PACKAGES := qemu-system-x86 busybox-static kmod xz-utils zstd debian-archive-keyring libelf1
# The kernels of tests/vm/kernels.toml that test-vm boots (all), and how much it runs there.
KERNEL ?=
SUITE ?= full

# Keep packages of the caller's home and shell out of the environment we pin.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

BIN := .venv/bin
PIP = PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip -q
INPUTS := pyproject.toml constraints.txt stalld/__init__.py

# A virtual environment knows its own path and interpreter; after a copy, a move or an upgrade
# of Python it must be made anew. (Not `:=`: on a fresh machine Python comes with `packages`.)
VENV_ID = $(CURDIR) $(realpath $(shell command -v $(PYTHON)))
ifneq ($(strip $(shell cat .venv/.id 2>/dev/null)),$(strip $(VENV_ID)))
.PHONY: .venv/.id
endif

# $(call missing,PACKAGES): those that are not installed.
missing = $(filter-out $(patsubst %=installed,%,$(filter %=installed,$(shell \
	dpkg-query -W -f '$${Package}=$${db:Status-Status}\n' $(1) 2>/dev/null))),$(1))

define apt_install
$(if $(shell command -v apt-get),,$(error this needs a Debian system; not installed: $(1)))
$(if $(filter 0,$(shell id -u)),,$(error missing Debian packages; as root run: \
	apt-get update && apt-get install --no-install-recommends $(1)))
@echo 'Installing $(1)'
@export DEBIAN_FRONTEND=noninteractive; apt-get -qq update && \
	apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 \
	install --no-install-recommends $(1) >/dev/null
endef

need_root = $(if $(filter 0,$(shell id -u)),,$(error `make $(1)` loads BPF programs \
	and needs root: run it with sudo or in a root shell))

.PHONY: help setup run test test-vm support-matrix check demo install uninstall clean
.PHONY: bench bench-long bench-fidelity bench-soak
.PHONY: packages test-packages vm-packages bench-packages
.PHONY: root-run root-test root-test-vm root-support-matrix root-demo
.PHONY: root-bench root-bench-long root-bench-fidelity root-bench-soak

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

setup: packages .venv/.installed ## install what is missing: Debian packages, .venv, the project

run: root-run setup ## set up and detect in the foreground until Ctrl-C (ARGS="--threshold-ms 5")
	@exec $(BIN)/softirq-stalld run $(ARGS)

test: root-test setup test-packages .venv/.dev ## set up and run all tests (ARGS="-k tracker")
	@$(BIN)/python -m pytest $(ARGS)

test-vm: root-test-vm setup test-packages vm-packages .venv/.vm ## run the kernel tests on other kernels (KERNEL="6.1 7" SUITE=short ARGS=--refresh)
	@$(BIN)/python -m tests.vm $(KERNEL) --suite $(SUITE) $(ARGS)

support-matrix: root-support-matrix setup test-packages vm-packages .venv/.vm ## the same on all of them, written to docs/support-matrix.md
	@$(BIN)/python -m tests.vm --suite $(SUITE) --matrix docs/support-matrix.md $(ARGS)

check: setup .venv/.dev ## lint, formatting and types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy $(PY_DIRS)
	@$(if $(C_FILES),$(BIN)/clang-format --dry-run -Werror $(C_FILES))

demo: root-demo setup test-packages .venv/.dev ## cause a bounded stall of each kind, show the catch
	@exec $(BIN)/python -m tests.demo $(ARGS)

bench: root-bench setup bench-packages .venv/.dev ## measure every figure: bench/RESULTS.md (ARGS="--only hot_path")
	@exec $(BIN)/python -m bench $(ARGS)

bench-fidelity: root-bench-fidelity setup test-packages .venv/.dev ## 1,000 injected stalls: all found and told rightly?
	@exec $(BIN)/python -m bench.fidelity --stalls 1000 $(ARGS)

bench-soak: root-bench-soak setup bench-packages .venv/.dev ## an hour of real load, nothing injected: any false stall?
	@exec $(BIN)/python -m bench.soak --seconds 3600 --threshold-ms 10 $(ARGS)

bench-long: root-bench-long setup bench-packages .venv/.dev ## the long runs that some goals are about, hours (ARGS=memory)
	@exec $(BIN)/python -m bench --long $(ARGS)

# The program is a directory of its own beside the distribution's packages, which it sees: bcc is
# one of them. No virtual environment: that would know where it was made, and DESTDIR is not it.
install: setup ## install for systemd; honours DESTDIR (for packages) and PREFIX (/usr)
	@rm -rf '$(WHEELS)'/softirq_stalld-*.whl '$(DESTDIR)$(LIBDIR)'
	@$(PIP) wheel --no-deps --wheel-dir '$(WHEELS)' .
	@$(PIP) install --no-compile --target '$(DESTDIR)$(LIBDIR)' '$(WHEELS)'/softirq_stalld-*.whl
	@rm -rf '$(DESTDIR)$(LIBDIR)/bin' '$(DESTDIR)$(LIBDIR)'/softirq_stalld-*.dist-info/direct_url.json
	@$(BIN)/python -m compileall -q -s '$(DESTDIR)' -p / '$(DESTDIR)$(LIBDIR)'
	@install -d '$(DESTDIR)$(PREFIX)/bin'
	@printf '%s\n' '#!$(PYTHON) -sP' 'import sys' 'sys.path.insert(0, "$(LIBDIR)")' \
		'from stalld.cli import main' 'sys.exit(main())' >'$(DESTDIR)$(PREFIX)/bin/softirq-stalld'
	@chmod 755 '$(DESTDIR)$(PREFIX)/bin/softirq-stalld'
	@install -D -m 644 systemd/softirq-stalld.service \
		'$(DESTDIR)$(UNITDIR)/softirq-stalld.service'
	@sed -i 's|/usr/bin/softirq-stalld|$(PREFIX)/bin/softirq-stalld|' \
		'$(DESTDIR)$(UNITDIR)/softirq-stalld.service'
	@install -D -m 644 systemd/softirq-stalld.sysusers \
		'$(DESTDIR)/usr/lib/sysusers.d/softirq-stalld.conf'
	@install -D -m 644 systemd/softirq-stalld.logrotate \
		'$(DESTDIR)/etc/logrotate.d/softirq-stalld'
	@[ -e '$(DESTDIR)/etc/softirq-stalld/config.toml' ] || \
		install -D -m 644 systemd/config.toml '$(DESTDIR)/etc/softirq-stalld/config.toml'
	@$(if $(DESTDIR),,echo 'Installed. Next: systemd-sysusers && systemctl daemon-reload &&' \
		'systemctl enable --now softirq-stalld')

uninstall: ## remove what `make install` put there, but not the configuration
	@rm -rf '$(DESTDIR)$(LIBDIR)' '$(DESTDIR)$(PREFIX)/bin/softirq-stalld' \
		'$(DESTDIR)$(UNITDIR)/softirq-stalld.service' \
		'$(DESTDIR)/usr/lib/sysusers.d/softirq-stalld.conf' \
		'$(DESTDIR)/etc/logrotate.d/softirq-stalld'

clean: ## remove everything made here
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name .git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -prune \
		-exec rm -rf {} +
	@find bpf tests -name '*.o' -delete 2>/dev/null || true

PY_DIRS = $(shell for d in stalld tests bench; do \
	[ -z "$$(find $$d -name '*.py' -print -quit 2>/dev/null)" ] || echo $$d; done)
C_FILES = $(wildcard bpf/*.[ch] tests/injector/*.[ch] tests/vm/module/*.c)

root-run root-test root-test-vm root-support-matrix root-demo \
root-bench root-bench-long root-bench-fidelity root-bench-soak: root-%:
	$(call need_root,$*)@:

packages:
	$(if $(call missing,$(RUNTIME_PACKAGES)),$(call apt_install,$(call missing,$(RUNTIME_PACKAGES))),@:)

test-packages:
	$(if $(call missing,$(TEST_PACKAGES)),$(call apt_install,$(call missing,$(TEST_PACKAGES))),@:)

vm-packages:
	$(if $(call missing,$(VM_PACKAGES)),$(call apt_install,$(call missing,$(VM_PACKAGES))),@:)

bench-packages: test-packages
	$(if $(call missing,$(BENCH_PACKAGES)),$(call apt_install,$(call missing,$(BENCH_PACKAGES))),@:)

.venv/.id:
	@rm -rf .venv
	@$(PYTHON) -m venv --system-site-packages .venv
	@echo '$(VENV_ID)' >$@

.venv/.installed: .venv/.id $(INPUTS)
	@$(PIP) install --editable .
	@touch $@

.venv/.dev: .venv/.installed
	@$(PIP) install --editable '.[dev]'
	@touch $@

.venv/.vm: .venv/.dev
	@$(PIP) install --editable '.[dev,vm]'
	@touch $@

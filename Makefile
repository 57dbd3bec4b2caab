# Everything a checkout can do. Each target sets up what it needs: `make demo` and `make test` work on a fresh clone.
#
# FASTREF_DEBUG=1 and FASTREF_SANITIZE=address,undefined go with any target, for example `make test FASTREF_DEBUG=1`.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
ASV_ARGS ?=
CONFORMANCE_ARGS ?=
FASTREF_DEBUG ?=
FASTREF_SANITIZE ?=
export FASTREF_DEBUG FASTREF_SANITIZE

PY := $(VENV)/bin/python
comma := ,
MODE := $(if $(filter-out 0,$(FASTREF_DEBUG)),debug,release)$(addprefix -,$(subst $(comma),-,$(FASTREF_SANITIZE)))
VENV_STAMP := $(VENV)/.installed
BUILD_STAMP := build/built-$(MODE)
SOURCES := $(shell find fastref -name '*.py[xd]' -o -name '*.h')

# An instrumented extension needs its run-time library before the interpreter's own symbols.
ifneq (,$(findstring address,$(FASTREF_SANITIZE)))
# libstdc++ too: AddressSanitizer ends a program at its first C++ exception unless it sees who throws.
INSTRUMENTED := LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:max_allocation_size_mb=512:allocator_may_return_null=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
endif

.PHONY: demo test test-over-tcp conformance differences gates model tsan fuzz fuzz-decoders debug build lint format types docs \
	bench-quick bench-html bench-compare clean

# Tests of workers who do more than meet.
OVER_TCP := across_hosts async_execution autograd autograd_failures autograd_random bad_input calls compat death \
	dynamic_groups failpoints faulty_agent fork forwarding futures init_methods large_leases leases main_objects \
	membership message_stories misconfigured no_memory optimizer outstanding picklers pickling profiling proxy publishing \
	publishing_faults reference_machine reference_scenarios reference_values references remote_exceptions \
	remote_module scale script_values sessions sharing shortage signals small_shm stopped stress surface \
	tensor_kinds tensors_travel testing

demo: build
	$(INSTRUMENTED) $(PY) examples/parameter_server.py --compare

test: build
	$(INSTRUMENTED) $(PY) -m pytest $(PYTEST_ARGS)

# The same where no two workers share memory; what is about shared memory alone is skipped, and says why.
test-over-tcp: build
	FASTREF_TRANSPORT=tcp $(INSTRUMENTED) $(PY) -m pytest $(OVER_TCP:%=tests/test_%.py) $(PYTEST_ARGS)

conformance: build
	$(INSTRUMENTED) $(PY) -m tests.conformance $(CONFORMANCE_ARGS)

# What is different on purpose, run on torch, where all of it has to fail; `make test` runs it on fastref.
differences: build
	$(PY) -m tests.against_torch

gates: build
	$(INSTRUMENTED) $(PY) -m pytest -m gates $(PYTEST_ARGS)

model: build
	$(PY) -m tests.model

debug:
	$(MAKE) build FASTREF_DEBUG=1

build: $(BUILD_STAMP)

lint: $(VENV_STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV_STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: build
	$(PY) -m mypy

docs: build
	$(PY) -m sphinx -W --keep-going -q docs build/docs

bench-quick: build
	$(PY) -m fastref.bench --quick
	cd asv_bench && $(abspath $(PY)) -m asv machine --yes && \
		$(abspath $(PY)) -m asv run --python=same --quick --show-stderr $(ASV_ARGS)

ASV := cd asv_bench && $(abspath $(PY)) -m asv

# What was measured of every commit so far, as pages to look at; they appear in asv_bench/.asv/html.
bench-html: $(VENV_STAMP)
	$(ASV) publish

# This commit against another one, both built afresh; fails when a benchmark became 10 % worse.
# BENCH=Instructions selects what no neighbour disturbs.
BASE ?= HEAD~1
BENCH ?= .
bench-compare: $(VENV_STAMP)
	$(ASV) machine --yes
	$(ASV) continuous --factor 1.1 --bench '$(BENCH)' $(ASV_ARGS) $(BASE) HEAD

# Thread sanitizer needs the address space it knows, hence no randomization where the system lets us say so.
TSAN_TESTS := $(patsubst tests/c/%.c,build/tsan/%,$(wildcard tests/c/*.c))
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

tsan: $(TSAN_TESTS)
	@test -n "$(TSAN_TESTS)" || { echo "tsan: nothing in tests/c" >&2; exit 1; }
	@for test in $(TSAN_TESTS); do \
		echo "$$test"; TSAN_OPTIONS=halt_on_error=1 $(FIXED_ADDRESSES) $$test || exit 1; \
	done

build/tsan/%: tests/c/%.c $(wildcard fastref/_c/*.h tests/c/*.h)
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O1 -g -Wall -Wextra -fsanitize=thread -pthread -Ifastref/_c $< -o $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
	find fastref -name '*.so' -delete -o -name '*.c' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The packages named in pyproject.toml, at the versions in constraints.txt. The checkout is put on the path of the
# environment by a .pth file: programs and tests then run on the tree itself, and a change costs one incremental build.
$(VENV_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import tomllib; \
		conf = tomllib.load(open("pyproject.toml", "rb")); project = conf["project"]; \
		extras = [names for extra, names in project["optional-dependencies"].items() if extra != "bench"]; \
		print(*conf["build-system"]["requires"], *project["dependencies"], *sum(extras, []), sep="\n")' \
		> $(VENV)/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $(VENV)/requirements.txt
	echo "$(CURDIR)" > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastref-checkout.pth
	touch $@

# The tree holds the extensions of one mode at a time; those of another are removed, since a copy only replaces older ones.
$(BUILD_STAMP): $(VENV_STAMP) setup.py $(SOURCES)
	@mkdir -p build
	@ls build/built-* 2>/dev/null | grep -qxF $@ || find fastref -name '*.so' -delete
	@rm -f build/built-*
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

FUZZ_SECONDS ?= 60

fuzz: build/fuzz/ring_garbage
	build/fuzz/ring_garbage $(FUZZ_SECONDS)
	$(MAKE) fuzz-decoders FASTREF_SANITIZE=address,undefined

fuzz-decoders: build
	$(INSTRUMENTED) $(PY) -m tests.fuzz --seconds $(FUZZ_SECONDS)

build/fuzz/%: tests/c/%.c $(wildcard fastref/_c/*.h tests/c/*.h)
	@mkdir -p $(@D)
	$(CC) -std=gnu11 -O1 -g -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -Ifastref/_c $< -o $@

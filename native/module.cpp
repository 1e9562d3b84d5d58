// The door between Python and the core: check, convert, release the GIL, call. The only file that includes
// Python. Type stubs are made from the signatures and docstrings below, so both are written for readers of
// Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "problem.h"

namespace nb = nanobind;

namespace {

using Flags = nb::typed<nb::dict, nb::str, bool>;
using Values = nb::typed<nb::dict, nb::str, int>;
using Enums = nb::typed<nb::dict, nb::str, Values>;

static_assert(std::is_trivially_copyable_v<tilefold::Problem>);

const char* version() { return TILEFOLD_VERSION; }

Flags cpu_features() {
    nb::dict flags;
    for (const tilefold::Feature& feature : tilefold::features()) flags[feature.name] = feature.present;
    return flags;
}

const char* isa() { return tilefold::choose(std::getenv("TILEFOLD_ISA")).name; }

std::vector<std::pair<std::string, std::string>> problem_fields() {
#define ROW(type, name, annotation) {#name, annotation},
    return {TILEFOLD_PROBLEM(ROW)};
#undef ROW
}

Values values(std::initializer_list<std::pair<const char*, int>> rows) {
    nb::dict table;
    for (const auto& [name, value] : rows) table[name] = value;
    return table;
}

Enums problem_enums() {
    nb::dict enums;
#define ROW(name, value) {#name, tilefold::name},
    enums["Layout"] = values({TILEFOLD_LAYOUT(ROW)});
    enums["Has"] = values({TILEFOLD_HAS(ROW)});
    enums["Want"] = values({TILEFOLD_WANT(ROW)});
#undef ROW
    return enums;
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The native core of tilefold.";
    m.def("version", &version, "The version of tilefold that this core was built for.");
    m.def("cpu_features", &cpu_features,
          "The features that choose a machine, and whether this CPU and its operating system offer them.");
    m.def("isa", &isa,
          "The machine that runs here: the best one that the CPU supports, or the one that TILEFOLD_ISA "
          "names.\n\n"
          "ValueError where TILEFOLD_ISA names no machine, or one that this CPU does not support.");
    m.def("problem_fields", &problem_fields,
          "Name and Python annotation of each field of the native Problem, in order.");
    m.def("problem_enums", &problem_enums,
          "Name and value of each member of the native enumerations Layout, Has and Want.");
}

// Which machine the core runs on: the features that this CPU reports, and the machines that they add up to.
#pragma once

#include <span>

#include "fold.h"

namespace tilefold {

// A feature of this processor's architecture; those of other architectures are not listed at all.
struct Feature {
    const char* name;
    unsigned bit;
    bool present;
};

// A machine is a name for a set of features. The name is what TILEFOLD_ISA, plans and reports say.
struct Machine {
    const char* name;
    unsigned needs;
    const Kernels& (*kernels)(DType storage);
};

std::span<const Feature> features();

// The machine called `name`, or the best one this CPU supports where `name` is null or empty.
// Throws std::invalid_argument for a name that is unknown or that this CPU does not support.
const Machine& choose(const char* name);

}  // namespace tilefold

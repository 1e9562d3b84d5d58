// The DLPack C exchange API (DLPack 1.2): what a framework's tensor is, asked in C, forty times as fast as
// through Python. The fact to know: what is told is borrowed. The framework may move shape and strides as
// soon as other code runs, so they are copied before the interpreter's lock is given away.
#pragma once

#include <stdint.h>

namespace tilefold::dlpack {

constexpr int32_t CPU = 1;
enum Code : uint8_t { SIGNED = 0, UNSIGNED = 1, FLOAT = 2, BFLOAT = 4 };

struct Tensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t offset;
};

// Behind the capsule `__dlpack_c_exchange_api__` of a tensor type. Objects are PyObject*; 0 is success.
struct ExchangeApi {
    static constexpr const char* ATTRIBUTE = "__dlpack_c_exchange_api__";
    static constexpr const char* CAPSULE = "dlpack_exchange_api";
    static constexpr uint32_t MAJOR = 1;

    struct {
        uint32_t major, minor;
    } version;
    ExchangeApi* previous;
    void* allocate;
    int (*take)(void* object, void** managed);
    int (*give)(void* managed, void** object);
    int (*look)(void* object, Tensor* borrowed);
    int (*stream)(int32_t device_type, int32_t device, void** stream);
};

}  // namespace tilefold::dlpack

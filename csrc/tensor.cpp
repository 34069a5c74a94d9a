#include "tensor.h"

#include <new>

#include "block.h"

namespace py = pybind11;

namespace sparse_ft {
namespace {

// What torch offers, as DLPack 1.3 lays it out. Functions give 0, or set a Python error.
struct Exchange {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void* allocate;
    void* export_tensor;
    int (*import_tensor)(DLManagedTensorVersioned*, void** object);
    int (*view)(void* object, DLTensor*);
    void* current_stream;
};

// torch's, as long as the process lives.
const Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

// torch's own answers to who is watching; new references, as long as the process lives.
struct Watchers {
    PyObject *dispatch_modes, *function_modes, *transforms, *tracer, *profiler;
} watchers;

py::object answer(PyObject* watcher) {
    PyObject* const answer = PyObject_CallNoArgs(watcher);
    if (answer == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(answer);
}
bool is_off(PyObject* watcher) {  // gives a number, a truth value or None
    const int on = PyObject_IsTrue(answer(watcher).ptr());
    if (on < 0) throw py::error_already_set();
    return on == 0;
}
bool is_none(PyObject* watcher) { return answer(watcher).is_none(); }

constexpr int32_t kCpu = 1;
constexpr int64_t kNoVersion = -1;

// kNoVersion for a tensor made in inference mode.
int64_t version_of(py::handle tensor) {
    static PyObject* const version = PyUnicode_InternFromString("_version");
    PyObject* const number = PyObject_GetAttr(tensor.ptr(), version);
    if (number == nullptr) {
        PyErr_Clear();
        return kNoVersion;
    }
    const int64_t value = PyLong_AsLongLong(number);
    Py_DECREF(number);
    return value;
}

}  // namespace

void find_exchange() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__"))
        throw py::import_error("sparse_ft needs torch 2.10 or newer (pip install --upgrade 'torch>=2.10')");
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) throw py::error_already_set();
    const py::object c = torch.attr("_C");
    const auto keep = [](const py::object& function) { return function.inc_ref().ptr(); };
    watchers = {keep(c.attr("_len_torch_dispatch_stack")), keep(c.attr("_len_torch_function_stack")),
                keep(c.attr("_functorch").attr("peek_interpreter_stack")), keep(c.attr("_get_tracing_state")),
                keep(c.attr("_autograd").attr("_profiler_enabled"))};
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.ptr());
    if (exchange->version.major != 1 || exchange->view == nullptr || exchange->import_tensor == nullptr)
        throw py::import_error(
            "this torch hands tensors over in a way that this sparse_ft does not know (DLPack 2 or later): upgrade "
            "sparse_ft, or install an older torch");
}

bool untransformed() {
    return is_off(watchers.dispatch_modes) && is_off(watchers.function_modes) && is_none(watchers.transforms) &&
           is_none(watchers.tracer);
}

bool unwatched(const py::args& args) {
    if (!untransformed() || !is_off(watchers.profiler)) return false;
    for (py::handle arg : args) {
        PyTypeObject* const type = Py_TYPE(arg.ptr());
        if (type != tensor_type && type != parameter_type && PyType_IsSubtype(type, tensor_type)) return false;
    }
    return true;
}

bool counts_versions(py::handle tensor) { return version_of(tensor) != kNoVersion; }

py::bytes versions_of(const py::args& tensors) {
    std::vector<int64_t> numbers;
    for (const py::handle& each : tensors) numbers.push_back(each.is_none() ? kNoVersion : version_of(each));
    return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

py::object state_of(const py::sequence& tensors) {
    std::vector<int64_t> numbers;
    for (const py::handle& each : tensors) {
        numbers.push_back(version_of(each));
        if (numbers.back() == kNoVersion) return py::none();
        numbers.push_back(reinterpret_cast<int64_t>(Tensor(each).data<void>()));
    }
    return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

Tensor::Tensor(py::handle object) {
    if (object.is_none()) return;
    given_ = true;
    count_ = -1;
    DLTensor tensor;
    if (exchange->view(object.ptr(), &tensor) != 0) {
        PyErr_Clear();
        return;
    }
    if (tensor.device.type != kCpu || tensor.dtype.lanes != 1) return;
    code_ = tensor.dtype.code;
    bits_ = tensor.dtype.bits;
    dimensions_ = tensor.dimensions;
    sizes_ = tensor.shape;
    strides_ = tensor.strides;
    data_ = static_cast<char*>(tensor.data) + tensor.byte_offset;
    count_ = 1;
    for (int i = 0; i < dimensions_; ++i) count_ *= sizes_[i];
}

bool Tensor::is_contiguous() const {
    int64_t stride = 1;
    for (int i = dimensions_ - 1; i >= 0; --i) {
        if (sizes_[i] != 1 && strides_[i] != stride) return count_ == 0;
        stride *= sizes_[i];
    }
    return true;
}

bool Tensor::is_batch_last() const {
    if (dimensions_ != 4) return false;
    const int64_t n = sizes_[0], h = sizes_[2], w = sizes_[3];
    const int64_t want[] = {1, h * w * n, w * n, n};
    for (int i = 0; i < 4; ++i)
        if (sizes_[i] != 1 && strides_[i] != want[i]) return false;
    return true;
}

NewTensor new_tensor(Element element, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    DLManagedTensorVersioned* block = make_block(element, sizes, strides);
    if (block == nullptr) throw std::bad_alloc();
    void *const data = block->tensor.data, *object = nullptr;
    if (exchange->import_tensor(block, &object) != 0) {
        block->deleter(block);
        throw py::error_already_set();
    }
    return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)), data};
}

NewTensor new_batch_last(Element element, const int64_t* sizes) {
    const int64_t n = sizes[0], h = sizes[2], w = sizes[3];
    return new_tensor(element, {n, sizes[1], h, w}, {1, h * w * n, w * n, n});
}

NewTensor new_contiguous(Element element, const std::vector<int64_t>& sizes) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
    return new_tensor(element, sizes, strides);
}

NewTensor new_floats(int64_t count) { return new_tensor(Element::kFloat, {count}, {1}); }

}  // namespace sparse_ft

// A device for tests: torch takes it for an accelerator, and the CPU does its work.
//
// - Its addresses carry a bit that no memory has, so that host code which follows one crashes, as it would on a GPU.
// - Every operator runs as on the CPU, on the same memory; tensors of two devices do not mix, except scalars and indices.
// - A copy with non_blocking on a stream other than the default one is made as late as may be: when somebody waits, or
//   after so many launches as `lag` says.
//   What is freed meanwhile, and was not recorded on a stream, is overwritten with 0xff, which are NaNs.
// - What costs time on a GPU is counted: launches, copies, allocations, and where the host waits.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <unordered_map>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
constexpr auto kPretend = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
constexpr uintptr_t kTag = uintptr_t(1) << 62;

void* tagged(const void* p) { return p ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) | kTag) : nullptr; }
void* real(const void* p) { return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p) & ~kTag); }

// --- what is counted ------------------------------------------------------------------------------------------------

enum Counter { launches, allocations, allocated, live, peak, uploads, uploaded, downloads, downloaded, waits, kCounters };
int64_t counters[kCounters];
std::string waited;  // the operators that made the host wait, each followed by a space
std::recursive_mutex mutex;
thread_local DeviceIndex current_device = 0;
thread_local c10::StreamId current_stream[kDevices] = {0, 0};

void wait_for(const std::string& what) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    ++counters[waits];
    waited += what + " ";
}

// --- streams: copies that wait for somebody to wait for them --------------------------------------------------------

struct Work {
    c10::StreamId stream;
    int64_t tick;  // launches before it
    std::function<void()> run;
};
std::deque<Work> queue;  // of all streams, in order
int64_t queued = 0, done = 0, ticks = 0, lag = INT64_MAX;
c10::StreamId last_stream = 0;

struct Block {
    void* memory;
    size_t size;
    bool recorded = false;
};
std::vector<Block*> freed;  // that a copy may still read or write

void release(Block* block) {
    std::free(block->memory);
    delete block;
}

void run_until(int64_t end) {  // everything that was queued up to then: later than on any GPU, never earlier
    std::lock_guard<std::recursive_mutex> lock(mutex);
    while (done < end && !queue.empty()) {
        queue.front().run();
        queue.pop_front();
        ++done;
    }
    if (queue.empty()) {
        for (Block* block : freed) release(block);
        freed.clear();
    }
}

void launch() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    ++counters[launches];
    ++ticks;
    int64_t old = 0;
    for (const Work& work : queue) old += ticks - work.tick >= lag;
    if (old) run_until(done + old);
}

// --- memory ---------------------------------------------------------------------------------------------------------

void free_block(void* context) {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    Block* block = static_cast<Block*>(context);
    counters[live] -= int64_t(block->size);
    if (queue.empty()) return release(block);
    if (!block->recorded) std::memset(block->memory, 0xff, block->size);
    freed.push_back(block);
}

c10::DataPtr fresh(size_t size) {
    Device device(kPretend, current_device);
    if (size == 0) return {nullptr, device};
    std::lock_guard<std::recursive_mutex> lock(mutex);
    auto* block = new Block{std::aligned_alloc(64, (size + 63) / 64 * 64), size};
    ++counters[allocations];
    counters[allocated] += int64_t(size);
    counters[live] += int64_t(size);
    counters[peak] = std::max(counters[peak], counters[live]);
    return {tagged(block->memory), block, &free_block, device};
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t size) override { return fresh(size); }
    void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(real(to), real(from), size); }
} allocator;
REGISTER_ALLOCATOR(kPretend, &allocator);

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return kDevices; }
    DeviceIndex getCurrentDevice() const override { return current_device; }
    void setCurrentDevice(DeviceIndex device) const override { current_device = device; }
    DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current_device, device); }
    DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return std::exchange(current_device, device); }
    at::Device getDeviceFromPtr(void*) const override { return {kPretend, current_device}; }
    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
        c10::DataPtr data = fresh(size);
        std::memcpy(real(data.get()), real(storage.data()), std::min(size, storage.nbytes()));
        storage.unsafeGetStorageImpl()->set_data_ptr(std::move(data));
        storage.unsafeGetStorageImpl()->set_nbytes(size);
    }
};

struct Event {
    int64_t upto, tick;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kPretend; }
    Device getDevice() const override { return {kPretend, current_device}; }
    Device exchangeDevice(Device d) const override {
        Device before = getDevice();
        setDevice(d);
        return before;
    }
    void setDevice(Device d) const override {
        if (d.has_index()) TORCH_CHECK(d.index() < kDevices, "no device ", d);
        uncheckedSetDevice(d);
    }
    void uncheckedSetDevice(Device d) const noexcept override {
        if (d.has_index()) current_device = d.index();
    }
    DeviceIndex deviceCount() const noexcept override { return kDevices; }
    static Device indexed(Device d) { return d.has_index() ? d : Device(kPretend, current_device); }
    static c10::Stream stream(Device d, c10::StreamId id) {
        return c10::Stream(c10::Stream::UNSAFE, indexed(d), id);
    }
    c10::Stream getStream(Device d) const override { return stream(d, current_stream[indexed(d).index()]); }
    c10::Stream getDefaultStream(Device d) const override { return stream(d, 0); }
    c10::Stream getNewStream(Device d, int) const override { return stream(d, ++last_stream); }
    c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
    c10::Stream exchangeStream(c10::Stream s) const override {
        return stream(s.device(), std::exchange(current_stream[s.device_index()], s.id()));
    }
    void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
        if (*event == nullptr) *event = new Event;
        static_cast<Event*>(*event)->upto = queued;
        static_cast<Event*>(*event)->tick = ticks;
    }
    void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
    void block(void* event, const c10::Stream& s) const override {
        if (event != nullptr && s.id() == 0) run_until(static_cast<Event*>(event)->upto);
    }
    bool queryEvent(void* event) const override { return event == nullptr || static_cast<Event*>(event)->upto <= done; }
    void synchronizeEvent(void* event) const override {
        wait_for("event");
        if (event != nullptr) run_until(static_cast<Event*>(event)->upto);
    }
    bool queryStream(const c10::Stream&) const override { return queue.empty(); }
    void synchronizeStream(const c10::Stream&) const override {
        wait_for("stream");
        run_until(queued);
    }
    void synchronizeDevice(const DeviceIndex) const override {
        wait_for("device");
        run_until(queued);
    }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream&) const override {
        if (data.get_deleter() == &free_block) static_cast<Block*>(data.get_context())->recorded = true;
    }
    double elapsedTime(void* first, void* last, const DeviceIndex) const override {  // 10 µs for each launch
        return 1e-2 * double(static_cast<Event*>(last)->tick - static_cast<Event*>(first)->tick);
    }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- operators ------------------------------------------------------------------------------------------------------

bool is_ours(const Tensor& t) { return t.defined() && t.device().type() == kPretend; }

Tensor with_storage(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
    Tensor t = at::detail::make_tensor<at::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return t;
}

// The tensors of one call, as the CPU sees them.
struct Call {
    std::string name;
    std::optional<Device> device;
    std::unordered_map<c10::StorageImpl*, c10::Storage> seen;    // ours -> the same memory on the CPU
    std::unordered_map<c10::StorageImpl*, c10::Storage> origin;  // and back

    Tensor to_cpu(const Tensor& t) {
        if (!is_ours(t)) return t;
        TORCH_CHECK(!device || *device == t.device(), "Expected all tensors to be on the same device, but found ",
                    *device, " and ", t.device(), " in ", name);
        device = t.device();
        c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
        auto found = seen.find(storage);
        if (found == seen.end()) {
            c10::DataPtr data(real(storage->mutable_data()), Device(c10::DeviceType::CPU));
            c10::Storage alias(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data),
                               c10::GetAllocator(c10::DeviceType::CPU), true);
            origin.emplace(alias.unsafeGetStorageImpl(), t.storage());
            found = seen.emplace(storage, std::move(alias)).first;
        }
        Tensor alias = with_storage(found->second, c10::DispatchKey::CPU, t);
        if (t.is_conj()) alias._set_conj(true);
        if (t.is_neg()) alias._set_neg(true);
        return alias;
    }

    c10::Storage storage_of(const Tensor& t) {
        auto found = origin.find(t.storage().unsafeGetStorageImpl());
        if (found != origin.end()) return found->second;
        std::lock_guard<std::recursive_mutex> lock(mutex);
        // A result: its memory is copied into a block of ours, so that it is counted, and poisoned when it is freed.
        DeviceIndex before = std::exchange(current_device, device->index());
        c10::DataPtr data = fresh(t.storage().nbytes());
        current_device = before;
        if (data.get()) std::memcpy(real(data.get()), t.storage().data(), t.storage().nbytes());
        c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), &allocator, true);
        origin.emplace(t.storage().unsafeGetStorageImpl(), storage);
        return storage;
    }

    Tensor to_ours(const Tensor& t) {
        if (!t.defined() || is_ours(t)) return t;
        Tensor mine = with_storage(storage_of(t), c10::DispatchKey::PrivateUse1, t);
        if (t.is_conj()) mine._set_conj(true);
        if (t.is_neg()) mine._set_neg(true);
        return mine;
    }

    // After a call that wrote to `cpu`, the alias of `t`: it may have been resized.
    void update(const Tensor& t, const Tensor& cpu) {
        c10::StorageImpl* alias = cpu.storage().unsafeGetStorageImpl();
        c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
        if (alias->data() != real(storage->data())) {
            DeviceIndex before = std::exchange(current_device, t.device().index());
            c10::DataPtr data = fresh(alias->nbytes());
            current_device = before;
            if (data.get()) std::memcpy(real(data.get()), alias->data(), alias->nbytes());
            storage->set_data_ptr(std::move(data));
            storage->set_nbytes(alias->nbytes());
        }
        if (t.sizes() != cpu.sizes() || t.strides() != cpu.strides())
            t.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
};

const std::set<std::string> kWaiting = {"aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
                                        "aten::unique_dim", "aten::unique_consecutive"};
const std::set<std::string> kNondeterministic = {
    "aten::upsample_bilinear2d_backward", "aten::_adaptive_avg_pool2d_backward", "aten::adaptive_max_pool2d_backward",
    "aten::nll_loss2d_forward", "aten::nll_loss2d_backward",    "aten::upsample_nearest2d_backward", "aten::grid_sampler_2d_backward", "aten::kthvalue"};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    Call call{schema.name()};
    if (kNondeterministic.count(call.name))
        at::globalContext().alertNotDeterministic(call.name.substr(6) + "_pretend");
    const size_t count = schema.arguments().size(), start = stack->size() - count;
    std::vector<c10::IValue> given(stack->begin() + start, stack->end());
    bool host = false, indexed = call.name.find("index") != std::string::npos, masked = false;
    auto look = [&](const Tensor& t) {
        if (!t.defined()) return;
        host |= !is_ours(t) && t.dim() > 0;
        masked |= is_ours(t) && indexed && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
    };
    for (size_t i = 0; i < count; ++i) {
        c10::IValue& value = (*stack)[start + i];
        if (value.isTensor()) {
            look(value.toTensor());
            value = call.to_cpu(value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor& t : value.toTensorVector()) look(t), list.push_back(call.to_cpu(t));
            value = list;
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> list;
            for (std::optional<Tensor> t : value.toOptionalTensorVector())
                list.push_back(t && t->defined() ? (look(*t), std::optional<Tensor>(call.to_cpu(*t))) : std::nullopt);
            value = list;
        } else if (value.isDevice() && value.toDevice().type() == kPretend) {
            call.device = Guard::indexed(value.toDevice());
            value = Device(c10::DeviceType::CPU);
        }
    }
    TORCH_CHECK(!host || indexed, "Expected all tensors to be on the same device, but found ", *call.device,
                " and cpu in ", call.name);
    if (!call.device) call.device = Device(kPretend, current_device);
    if (kWaiting.count(call.name) || masked) wait_for(call.name);
    std::vector<c10::IValue> aliases(stack->begin() + start, stack->end());
    {
        c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
        op.callBoxed(stack);
    }
    bool fresh_results = schema.returns().empty();
    for (size_t i = 0; i < count; ++i) {
        const auto* info = schema.arguments()[i].alias_info();
        if (!info || !info->isWrite()) continue;
        fresh_results = true;
        if (given[i].isTensor() && is_ours(given[i].toTensor()))
            call.update(given[i].toTensor(), aliases[i].toTensor());
        else if (given[i].isTensorList())
            for (size_t k = 0; k < given[i].toTensorVector().size(); ++k)
                call.update(given[i].toTensorVector()[k], aliases[i].toTensorVector()[k]);
    }
    const size_t first = stack->size() - schema.returns().size();
    for (size_t r = 0; r < schema.returns().size(); ++r) {
        c10::IValue& value = (*stack)[first + r];
        const auto* info = schema.returns()[r].alias_info();
        if (info && info->isWrite()) {  // one of the arguments
            for (size_t i = 0; i < count; ++i) {
                const auto* of = schema.arguments()[i].alias_info();
                if (of && *of == *info) value = given[i];
            }
        } else if (value.isTensor()) {
            fresh_results |= !call.origin.count(value.toTensor().defined()
                                                    ? value.toTensor().storage().unsafeGetStorageImpl()
                                                    : nullptr);
            value = call.to_ours(value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<Tensor> list;
            for (const Tensor& t : value.toTensorVector()) list.push_back(call.to_ours(t));
            fresh_results = true;
            value = list;
        }
    }
    if (fresh_results) launch();
}

c10::DeviceGuard on(std::optional<Device> d) { return c10::DeviceGuard(d.value_or(Device(kPretend, current_device))); }

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    auto guard = on(device);
    return at::detail::empty_generic_symint(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                            c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
    auto guard = on(device);
    return at::detail::empty_strided_generic(size, stride, &allocator,
                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                             c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
    const bool up = !is_ours(from), down = !is_ours(to);
    {
        std::lock_guard<std::recursive_mutex> lock(mutex);
        if (up || down) ++counters[up ? uploads : downloads];
        else launch();
        if (up) counters[uploaded] += int64_t(from.nbytes());
        if (down) counters[downloaded] += int64_t(to.nbytes());
    }
    // Aliases that own nothing, as a device's queue does not; host memory is the caller's to keep, too.
    Call source{"aten::copy_"}, target{"aten::copy_"};
    Tensor x = source.to_cpu(from), y = target.to_cpu(to);
    const Device device = up ? to.device() : from.device();
    const c10::StreamId stream = current_stream[device.index()];
    auto run = [x, y] {
        c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
        y.unsafeGetTensorImpl();
        const_cast<Tensor&>(y).copy_(x);
    };
    if (non_blocking && stream != 0) {
        auto bare = [](const Tensor& t) {
            c10::DataPtr data(t.storage().mutable_data(), Device(c10::DeviceType::CPU));
            c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
            return with_storage(storage, c10::DispatchKey::CPU, t);
        };
        Tensor a = bare(x), b = bare(y);
        std::lock_guard<std::recursive_mutex> lock(mutex);
        queue.push_back({stream, ticks, [a, b]() mutable {
                             c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
                             b.copy_(a);
                         }});
        ++queued;
    } else {
        if (down && !non_blocking) wait_for("copy");
        run();
    }
    return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}

at::Scalar scalar(const Tensor& t) {
    wait_for("item");
    Call call{"aten::item"};
    Tensor cpu = call.to_cpu(t);
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
    return cpu.item();
}

Tensor& set_storage(Tensor& t, c10::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
    t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
    return t;
}

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                   int64_t groups) {
    Call call{"aten::convolution"};
    std::optional<Tensor> bias;
    if (b && b->defined()) bias = call.to_cpu(*b);
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
    launch();
    return call.to_ours(at::convolution(call.to_cpu(x), call.to_cpu(w), bias, stride, padding, dilation, transposed,
                                        output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w,
                                                        at::IntArrayRef stride, at::IntArrayRef padding,
                                                        at::IntArrayRef dilation, bool transposed,
                                                        at::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
    Call call{"aten::convolution_backward"};
    const int64_t channels = transposed ? w.size(1) * groups : w.size(0);
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
    launch();
    auto [a, b, c] = at::convolution_backward(call.to_cpu(g), call.to_cpu(x), call.to_cpu(w),
                                              at::OptionalIntArrayRef(channels), stride, padding, dilation, transposed,
                                              output_padding, groups, mask);
    return {call.to_ours(a), call.to_ours(b), call.to_ours(c)};
}

Tensor& set_whole_storage(Tensor& t, c10::Storage storage) {
    const int64_t length = int64_t(storage.nbytes() / t.itemsize());
    return set_storage(t, std::move(storage), 0, {length}, {1});
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", scalar);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("set_.source_Storage", set_whole_storage);
    m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());  // torch's own resizes a result
    m.impl("convolution_overrideable", convolution);
    m.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace

extern "C" {
void pretend_register() { at::RegisterPrivateUse1HooksInterface(new Hooks); }
int64_t* pretend_counters() { return counters; }
const char* pretend_waited() { return waited.c_str(); }
void pretend_reset() {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    const int64_t now = counters[live];
    std::memset(counters, 0, sizeof counters);
    counters[live] = counters[peak] = now;
    waited.clear();
}
int64_t pretend_pending() { return queued - done; }
int64_t pretend_exchange_lag(int64_t launches) { return std::exchange(lag, launches); }
int64_t pretend_exchange_device(int64_t device) { return std::exchange(current_device, DeviceIndex(device)); }
}

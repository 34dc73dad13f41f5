// The store as Python sees it: tensors arrive as (dtype code, shape, address). Every call that may wait or copy runs
// without the interpreter's lock; so does every destructor that takes a lock of the store, because threads of the
// store take the interpreter's lock in the pool's hooks.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include "store/checksum.h"
#include "store/errors.h"
#include "store/faults.h"
#include "store/store.h"

namespace py = pybind11;

namespace mgd {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

// Deletes without the interpreter's lock. In a fork it does not: the files are the parent's, and a lock may be held by
// a thread that does not exist there, so that what is part of a store is leaked on purpose.
struct OwnersDelete {
    pid_t owner = getpid();
    template <class T>
    void operator()(T* object) const {
        if (getpid() != owner) return;
        py::gil_scoped_release unlocked;
        delete object;
    }
};

template <class T>
using Held = std::unique_ptr<T, OwnersDelete>;

struct HeldBuffer {
    BufferPtr buffer;
};

struct HeldLease {
    std::unique_ptr<Lease> lease;
};

py::object held(BufferPtr buffer) {
    if (!buffer) return py::none();
    return py::cast(Held<HeldBuffer>(new HeldBuffer{std::move(buffer)}));
}

py::object leased(std::unique_ptr<Lease> lease) {
    if (!lease) return py::none();
    return py::cast(Held<HeldLease>(new HeldLease{std::move(lease)}));
}

// Of a path or a message with one, which may be any bytes.
py::str text(const std::string& bytes) {
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeFSDefaultAndSize(bytes.data(), static_cast<py::ssize_t>(bytes.size())));
}

Tier tier_of(const std::string& name) {
    if (name == "host") return Tier::host;
    if (name == "disk") return Tier::disk;
    throw BadStoreArgument("expected tier 'host' or 'disk'; got '" + name + "'");
}

py::bytes key_bytes(const std::string& key) { return py::bytes(key); }

using Tensors = std::vector<std::pair<uint32_t, std::vector<int64_t>>>;

std::vector<TensorInfo> infos_of(const std::string& key, const Tensors& tensors) {
    if (!valid_key(key)) throw BadStoreArgument("expected a key of the format; got '" + key + "': it must be UTF-8");
    std::vector<TensorInfo> infos(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        infos[i].dtype = tensors[i].first;
        infos[i].shape = tensors[i].second;
    }
    return infos;
}

Header layout(const TieredStore& store, const std::string& key, bool sequence, const Tensors& tensors) {
    return store.layout(key, sequence, infos_of(key, tensors));
}

template <class Pointer>
std::vector<Pointer> pointers(const std::vector<uintptr_t>& addresses, size_t expected) {
    if (addresses.size() != expected)
        throw BadStoreArgument("expected one address per tensor; got " + std::to_string(addresses.size()) + " for " +
                               std::to_string(expected));
    std::vector<Pointer> result;
    for (uintptr_t a : addresses) result.push_back(reinterpret_cast<Pointer>(a));
    return result;
}

py::list pieces(const Header& header, uint32_t chunk) {
    py::list result;
    for (const Piece& p : header.pieces(chunk))
        result.append(py::make_tuple(p.tensor, p.tensor_offset, p.chunk_offset, p.bytes));
    return result;
}

py::dict reading(const Meter::Reading& r) {
    py::dict d;
    d["bytes"] = r.bytes;
    d["seconds"] = r.seconds;
    return d;
}

py::dict stats(const TieredStore& store) {
    TieredStore::Stats s;
    {
        py::gil_scoped_release unlocked;
        s = store.stats();
    }
    py::dict d;
    d["pool_limit"] = s.pool.limit;
    d["pool_mapped"] = s.pool.mapped;
    d["pool_in_use"] = s.pool.in_use;
    d["pool_peak"] = s.pool.peak;
    d["pool_reused"] = s.pool.reused;
    d["host_limit"] = s.host_limit;
    d["host_used"] = s.host_used;
    d["disk_limit"] = s.disk_limit;
    d["disk_used"] = s.disk_used;
    d["disk_peak"] = s.disk_peak;
    d["entries"] = s.entries;
    d["read_ahead_hits"] = s.prefetch_hits;
    d["read_ahead_drops"] = s.prefetch_drops;
    d["committed"] = s.committed;
    d["viewed"] = s.viewed;
    d["put"] = reading(s.put);
    d["get"] = reading(s.get);
    d["write"] = reading(s.write);
    d["read"] = reading(s.read);
    d["direct"] = s.direct;
    d["why_buffered"] = s.why_buffered;
    d["directory"] = text(s.directory);
    return d;
}

void raise(const char* name, const py::tuple& arguments) {
    const py::object type = py::module_::import("mgd_kernels.errors").attr(name);
    const py::object error = type(*arguments);
    PyErr_SetObject(type.ptr(), error.ptr());
}

py::object python_key(const std::string& key) {
    return py::module_::import("mgd_kernels.store.format").attr("decode_key")(key_bytes(key));
}

void translate(std::exception_ptr p) {
    try {
        if (p) std::rethrow_exception(p);
    } catch (const ForeignEntry& e) {
        raise("ForeignEntry", py::make_tuple(python_key(e.key), text(e.what())));
    } catch (const CorruptState& e) {
        const py::object chunk = e.chunk == kWholeFile ? py::object(py::none()) : py::int_(e.chunk);
        raise("CorruptState", py::make_tuple(python_key(e.key), chunk, text(e.what())));
    } catch (const StoreFull& e) {
        raise("StoreFull", py::make_tuple(e.needs, e.has, text(e.what())));
    } catch (const StoreBusy& e) {
        raise("StoreBusy", py::make_tuple(text(e.path), e.pid));
    } catch (const UnknownFormat& e) {
        raise("UnknownFormat", py::make_tuple(text(e.path), text(e.what())));
    } catch (const StoreIOError& e) {
        raise("StoreIOError", py::make_tuple(e.error, text(e.path), text(e.what())));
    } catch (const StoreClosed& e) {
        raise("StoreClosed", py::make_tuple(e.what()));
    } catch (const BadStoreArgument& e) {
        raise("BadArgument", py::make_tuple(text(e.what())));
    } catch (const MissingKey& e) {
        PyErr_SetObject(PyExc_KeyError, python_key(e.what()).ptr());
    }
}

void set_hooks(TieredStore& store, const py::function& mapped, const py::function& unmapping) {
    // The functions are shared with threads that do not hold the interpreter's lock: copied and destroyed under it.
    const auto hook = [](const py::function& f) -> BufferPool::Hook {
        std::shared_ptr<py::function> shared(new py::function(f), [](py::function* p) {
            py::gil_scoped_acquire locked;
            delete p;
        });
        return [shared](void* data, size_t bytes) {
            py::gil_scoped_acquire locked;
            try {
                (*shared)(reinterpret_cast<uintptr_t>(data), bytes);
            } catch (py::error_already_set& e) {
                e.discard_as_unraisable("a hook of the store's buffer pool");
            }
        };
    };
    store.pool().set_hooks(hook(mapped), hook(unmapping));
}

}  // namespace

void bind_store(py::module_& m) {
    py::register_exception_translator(translate);

    py::class_<HeldBuffer, Held<HeldBuffer>>(m, "StoreBuffer", py::buffer_protocol())
        .def_buffer([](HeldBuffer& b) {
            return py::buffer_info(reinterpret_cast<uint8_t*>(b.buffer->data()),
                                   static_cast<py::ssize_t>(b.buffer->size()));
        })
        .def_property_readonly("address",
                               [](const HeldBuffer& b) { return reinterpret_cast<uintptr_t>(b.buffer->data()); });

    py::class_<HeldLease, Held<HeldLease>>(m, "StoreLease", py::buffer_protocol())
        .def_buffer([](HeldLease& h) {
            return py::buffer_info(reinterpret_cast<uint8_t*>(h.lease->buffer->data()),
                                   static_cast<py::ssize_t>(h.lease->buffer->size()));
        })
        .def("__len__", [](const HeldLease& h) { return h.lease->bytes(); });

    py::class_<TieredStore, Held<TieredStore>>(m, "TieredStore")
        .def(py::init([](uint64_t host, uint64_t staging, uint64_t chunk, const std::string& directory, uint64_t disk,
                         bool persistent, bool durable, unsigned threads) {
                 StoreOptions options;
                 options.host_bytes = host;
                 options.staging_bytes = staging;
                 options.chunk_bytes = chunk;
                 options.directory = directory;
                 options.disk_bytes = disk;
                 options.persistent = persistent;
                 options.durable = durable;
                 options.threads = threads;
                 py::gil_scoped_release unlocked;
                 return Held<TieredStore>(new TieredStore(options));
             }),
             py::kw_only(), py::arg("host"), py::arg("staging"), py::arg("chunk"), py::arg("directory"),
             py::arg("disk"), py::arg("persistent"), py::arg("durable"), py::arg("threads"))
        .def("put",
             [](TieredStore& s, const std::string& key, bool sequence, const Tensors& tensors,
                const std::vector<uintptr_t>& addresses, const std::string& tier) {
                 Header header = layout(s, key, sequence, tensors);
                 const auto sources = pointers<const void*>(addresses, tensors.size());
                 py::gil_scoped_release unlocked;
                 s.put(std::move(header), sources, tier_of(tier));
             })
        .def("get",
             [](TieredStore& s, const std::string& key, const std::vector<uintptr_t>& addresses, bool keep) {
                 py::gil_scoped_release unlocked;
                 s.get(key, pointers<void*>(addresses, s.describe(key).tensors.size()), keep);
             })
        .def("reserve",
             [](TieredStore& s, uint64_t bytes) {
                 std::unique_ptr<Lease> lease;
                 {
                     py::gil_scoped_release unlocked;
                     lease = s.reserve(bytes);
                 }
                 return leased(std::move(lease));
             })
        .def("commit",
             [](TieredStore& s, const std::string& key, bool sequence, const Tensors& tensors, const HeldLease& held) {
                 std::vector<TensorInfo> infos = infos_of(key, tensors);
                 py::gil_scoped_release unlocked;
                 s.commit(key, sequence, std::move(infos), *held.lease);
             })
        .def("view",
             [](TieredStore& s, const std::string& key, bool keep) {
                 std::unique_ptr<Lease> lease;
                 {
                     py::gil_scoped_release unlocked;
                     lease = s.view(key, keep);
                 }
                 return leased(std::move(lease));
             })
        .def(
            "begin_put",
            [](TieredStore& s, const std::string& key, bool sequence, const Tensors& tensors, const std::string& tier) {
                Header header = layout(s, key, sequence, tensors);
                py::gil_scoped_release unlocked;
                return Held<Put>(new Put(s, std::move(header), tier_of(tier)));
            },
            py::keep_alive<0, 1>())
        .def(
            "begin_get",
            [](TieredStore& s, const std::string& key) {
                py::gil_scoped_release unlocked;
                return Held<Get>(new Get(s, key));
            },
            py::keep_alive<0, 1>())
        .def("describe",
             [](const TieredStore& s, const std::string& key) {
                 TieredStore::Description found;
                 {
                     py::gil_scoped_release unlocked;
                     found = s.describe(key);
                 }
                 py::list tensors;
                 for (const TensorInfo& t : found.tensors) tensors.append(py::make_tuple(t.dtype, t.shape));
                 return py::make_tuple(found.tier == Tier::host ? "host" : "disk", found.sequence, tensors);
             })
        .def("prefetch", &TieredStore::prefetch, Unlocked())
        .def("remove", &TieredStore::remove, Unlocked())
        .def("clear", &TieredStore::clear, Unlocked())
        .def("contains", &TieredStore::contains, Unlocked())
        .def("keys",
             [](const TieredStore& s) {
                 std::vector<std::string> keys;
                 {
                     py::gil_scoped_release unlocked;
                     keys = s.keys();
                 }
                 py::list result;
                 for (const std::string& key : keys) result.append(key_bytes(key));
                 return result;
             })
        .def(
            "trim", [](TieredStore& s) { s.pool().trim(); }, Unlocked())
        .def("flush", &TieredStore::flush, Unlocked())
        .def("check", &TieredStore::check, Unlocked())
        .def(
            "close",
            [](TieredStore& s) {
                if (!s.forked()) s.close();
            },
            Unlocked())
        .def("stats", &stats)
        .def("set_hooks", &set_hooks);

    py::class_<Put, Held<Put>>(m, "StorePut")
        .def_property_readonly("chunks", [](const Put& p) { return p.header().chunks(); })
        .def("pieces", [](const Put& p, uint32_t chunk) { return pieces(p.header(), chunk); })
        .def("buffer",
             [](Put& p, uint32_t chunk, bool wait) {
                 BufferPtr buffer;
                 {
                     py::gil_scoped_release unlocked;
                     buffer = p.buffer(chunk, wait);
                 }
                 return held(std::move(buffer));
             })
        .def("commit",
             [](Put& p, uint32_t chunk, const HeldBuffer& buffer) {
                 BufferPtr copy = buffer.buffer;
                 py::gil_scoped_release unlocked;
                 p.commit(chunk, std::move(copy));
             })
        .def("close", &Put::close, Unlocked())
        .def("abort", &Put::abort, Unlocked());

    py::class_<Get, Held<Get>>(m, "StoreGet")
        .def_property_readonly("chunks", [](const Get& g) { return g.header().chunks(); })
        .def("pieces", [](const Get& g, uint32_t chunk) { return pieces(g.header(), chunk); })
        .def("chunk",
             [](Get& g, uint32_t chunk, bool wait) {
                 BufferPtr buffer;
                 {
                     py::gil_scoped_release unlocked;
                     buffer = g.chunk(chunk, wait);
                     if (buffer && g.summed())
                         g.verify(chunk, checksum(buffer->data(), g.header().chunk_size(chunk)), buffer->data());
                 }
                 return held(std::move(buffer));
             })
        .def("end", &Get::end, Unlocked());

#ifdef MGD_FAULT_INJECTION
    m.def("store_inject", &faults::arm, py::arg("kind"), py::arg("nth") = 1, py::arg("times") = 1,
          "Arms a fault in the store's I/O, for tests: calls nth .. nth + times - 1 of that kind fail. Returns how "
          "many calls of the kind before were seen.");
    m.def("store_record", &faults::record, "What was recorded of calls that change the disk, while that was armed.");
#endif
    m.def("store_sweep", &sweep_scratch, Unlocked(),
          "Removes the scratch directories under a directory that a crash left; returns how many.");
    m.def("checksum", [](const py::buffer& data) {
        const py::buffer_info info = data.request();
        return checksum(info.ptr, static_cast<size_t>(info.size * info.itemsize));
    });
}

}  // namespace mgd

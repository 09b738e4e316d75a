#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace salt {

namespace {

const int64_t PAGE = ::sysconf(_SC_PAGESIZE);

// Of the map of a file of so many bytes: to whole pages, and one more.
int64_t map_bytes(int64_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE + PAGE; }

}  // namespace

File::File(const std::string& path) : fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
  struct stat status;
  if (::fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
    void* at = ::mmap(nullptr, static_cast<size_t>(map_bytes(status.st_size)), PROT_READ,
                      MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) map = static_cast<const char*>(at), mapped = status.st_size;
  }
}

File::~File() {
  if (map) ::munmap(const_cast<char*>(map), static_cast<size_t>(map_bytes(mapped)));
  ::close(fd);
}

bool File::resident([[maybe_unused]] int64_t start, [[maybe_unused]] int64_t end) const {
#if defined(__linux__)
  constexpr int64_t PAGES = 1024;  // asked about at once
  if (!map || start < 0 || end > mapped) return false;
  unsigned char there[PAGES];
  // The page past the file's end is in no memory. Where it is said to be, nothing is told.
  if (::mincore(const_cast<char*>(map) + map_bytes(mapped) - PAGE, static_cast<size_t>(PAGE),
                there) ||
      there[0] & 1)
    return false;
  for (int64_t at = start / PAGE * PAGE; at < end; at += PAGES * PAGE) {
    const int64_t count = (std::min(end - at, PAGES * PAGE) + PAGE - 1) / PAGE;
    if (::mincore(const_cast<char*>(map) + at, static_cast<size_t>(count * PAGE), there))
      return false;
    if (!std::all_of(there, there + count, [](unsigned char page) { return page & 1; }))
      return false;
  }
  return true;
#else
  return false;
#endif
}

void File::advise(int64_t start, int64_t bytes) const {
#if defined(POSIX_FADV_WILLNEED)
  if (resident(start, start + bytes)) return;
  constexpr int64_t PIECE = 128 << 10;  // Linux reads no more of one request than the device's
                                        // read_ahead_kb, which is 128 by default
  for (int64_t at = start; at < start + bytes; at += PIECE)
    ::posix_fadvise(fd, at, start + bytes - at < PIECE ? start + bytes - at : PIECE,
                    POSIX_FADV_WILLNEED);
#endif
}

namespace {

constexpr int64_t ROWS_A_TASK = 392;  // a quarter of a default record: with more threads than
                                      // records none waits long for the last one
constexpr int64_t GAP = 4;    // pread: unwanted rows that cost less to read along than a call of
                              // their own; 2 to 8 measure the same
constexpr int64_t AHEAD = 6;  // rows prefetched, as in cpu.cpp

// Whether the pages of [start, end) are in memory now. False: nothing is known, or an error waits
// there.
bool populate(const File& file, int64_t start, int64_t end) {
#if defined(__linux__)
#ifndef MADV_POPULATE_READ
  constexpr int MADV_POPULATE_READ = 22;
#endif
  struct stat status;
  // A file that was cut short: past its end there is SIGBUS, and before that, in the last page,
  // zeros that no row ever held.
  if (!file.map || end > file.mapped || ::fstat(file.fd, &status) != 0 || status.st_size < end)
    return false;
  if (file.resident(start, end)) return true;
  const int64_t first = start / PAGE * PAGE;
  int failed;
  do
    failed = ::madvise(const_cast<char*>(file.map) + first, static_cast<size_t>(end - first),
                       MADV_POPULATE_READ);
  while (failed && errno == EINTR);
  return !failed;
#else
  return false;
#endif
}

// memcpy past the caches: a batch is larger than they are, and would push out what the step is
// working on.
inline void copy_row(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      const __m128i* source = reinterpret_cast<const __m128i*>(from + i);
      __m128i* target = reinterpret_cast<__m128i*>(to + i);
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1),
                    c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(target, a), _mm_stream_si128(target + 1, b), _mm_stream_si128(target + 2, c),
          _mm_stream_si128(target + 3, d);
    }
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void put_row(const Record& record, int64_t row, const char* from, int64_t row_bytes) {
  if (record.scale)
    dequantise_row(reinterpret_cast<const int8_t*>(from), record.scale,
                   record.tokens ? record.tokens[row] : 1.0f, row_bytes,
                   reinterpret_cast<uint16_t*>(record.out) + row * row_bytes);
  else
    copy_row(record.out + row * row_bytes, from, row_bytes);
}

inline void prefetch_row(const char* from, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
#endif
}

// Read exactly `bytes`; false with *number = errno, or 0 at the end of the file.
bool read_fully(int fd, char* to, int64_t bytes, int64_t at, int* number) {
  while (bytes > 0) {
    const ssize_t got = ::pread(fd, to, static_cast<size_t>(bytes), at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      *number = got < 0 ? errno : 0;
      return false;
    }
    to += got, at += got, bytes -= got;
  }
  return true;
}

// Rows [begin, end) of one record, as far as they are wanted; false on an error.
bool read_part(const Record& record, int64_t begin, int64_t end, int64_t row_bytes,
               std::vector<int32_t>& list, std::vector<char>& buffer, ReadError* error) {
  list.clear();
  for (int64_t n = begin; n < end; ++n)
    if (!record.wanted || record.wanted[n]) list.push_back(static_cast<int32_t>(n));
  if (list.empty()) return true;
  const size_t count = list.size();
  const auto offset = [&](int64_t row) { return record.start + row * row_bytes; };
  if (populate(*record.file, offset(list.front()), offset(list.back() + 1))) {
    for (size_t i = 0; i < count; ++i) {
      if (i + AHEAD < count) prefetch_row(record.file->map + offset(list[i + AHEAD]), row_bytes);
      put_row(record, list[i], record.file->map + offset(list[i]), row_bytes);
    }
  } else {
    for (size_t i = 0, j; i < count; i = j) {
      for (j = i + 1; j < count && list[j] - list[j - 1] <= GAP + 1;) ++j;
      const int64_t first = list[i], bytes = (list[j - 1] - first + 1) * row_bytes;
      buffer.resize(static_cast<size_t>(bytes));
      if (!read_fully(record.file->fd, buffer.data(), bytes, offset(first), &error->number)) {
        error->row = first;
        return false;
      }
      for (size_t k = i; k < j; ++k)
        put_row(record, list[k], buffer.data() + (list[k] - first) * row_bytes, row_bytes);
    }
  }
#if defined(__SSE2__)
  _mm_sfence();
#endif
  return true;
}

}  // namespace

ReadError read_rows(const std::vector<Record>& records, int64_t rows, int64_t row_bytes,
                    int threads) {
  const int64_t parts = (rows + ROWS_A_TASK - 1) / ROWS_A_TASK,
                tasks = static_cast<int64_t>(records.size()) * parts;
  std::atomic<int64_t> next{0};
  std::mutex lock;
  ReadError first;
  const auto work = [&] {
    std::vector<int32_t> list;
    std::vector<char> buffer;
    for (int64_t task; (task = next++) < tasks;) {
      const int64_t r = task / parts, begin = task % parts * ROWS_A_TASK,
                    end = begin + ROWS_A_TASK < rows ? begin + ROWS_A_TASK : rows;
      ReadError error;
      try {
        if (read_part(records[static_cast<size_t>(r)], begin, end, row_bytes, list, buffer, &error))
          continue;
      } catch (const std::bad_alloc&) {
        error.row = begin, error.number = ENOMEM;
      }
      error.record = r;
      const std::lock_guard<std::mutex> hold(lock);
      if (first.record < 0 || r < first.record || (r == first.record && error.row < first.row))
        first = error;
      next = tasks;  // the others stop too
    }
  };
  std::vector<std::thread> team;
  for (int64_t t = 1; t < threads && t < tasks; ++t) {
    try {
      team.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: the ones there are do it
      break;
    }
  }
  work();
  for (std::thread& thread : team) thread.join();
  return first;
}

}  // namespace salt

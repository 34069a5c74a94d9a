# cmake -C csrc/sanitize.cmake: instruments the core for address and undefined-behaviour errors; see `make test-sanitize`.
# An error ends the process: a test that goes on would hide it.
set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "")
set(CMAKE_CXX_FLAGS "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" CACHE STRING "")

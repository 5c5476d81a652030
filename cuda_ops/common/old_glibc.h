// Included before every C++ file (setup.py): a library built on a new Linux then runs on any with
// glibc 2.28, where torch's own wheels begin. Without it, two symbols of newer versions are wanted.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
// exp has a version 2.29, which differs in that it leaves matherr out.
__asm__(".symver exp, exp@GLIBC_2.2.5");

// libstdc++ reads it (2.32) to count references without atomics in a process of one thread.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif

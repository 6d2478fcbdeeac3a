//go:build race

package loop

import (
	"errors"
	"syscall"
)

// The race detector has to learn that what a peer in the same process reads comes
// after it was written; package syscall tells it.

func callRead(fd int, p []byte) (int, syscall.Errno) { return called(syscall.Read(fd, p)) }

func callWrite(fd int, p []byte) (int, syscall.Errno) { return called(syscall.Write(fd, p)) }

func called(n int, err error) (int, syscall.Errno) {
	var errno syscall.Errno
	_ = errors.As(err, &errno) // 0: none
	return n, errno
}

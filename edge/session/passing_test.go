package session

import (
	"errors"
	"io"
	"os"
	"testing"
)

// TestPassing: the error with which most reads on an event loop end costs nothing.
func TestPassing(t *testing.T) {
	for err, want := range map[error]bool{os.ErrDeadlineExceeded: true, io.EOF: false, errors.New("broken"): false} {
		if got := passing(err); got != want {
			t.Errorf("%v: %t", err, got)
		}
		if n := testing.AllocsPerRun(100, func() { passing(err) }); n > 0 {
			t.Errorf("%v: %v allocations", err, n)
		}
	}
}

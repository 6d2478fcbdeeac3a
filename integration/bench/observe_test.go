package bench

import (
	"fmt"
	"io"
	"net"
	"testing"
)

// TestCapture proves that a reset is seen, and that a clean end is not taken for
// one.
func TestCapture(t *testing.T) {
	if err := CanCapture(t.Context(), t.TempDir()); err != nil {
		t.Skipf("tshark can't capture here: %v", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	_, port, err := net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := newCapture(t.Context(), t.TempDir(), port)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	}()
	for i, reset := range []bool{false, true, true, false} {
		if err := end(listener, reset); err != nil {
			t.Fatal(err)
		}
		resets, late, err := c.counts(t.Context())
		if want := []int64{0, 1, 2, 2}[i]; err != nil || resets != want || late != 0 {
			t.Errorf("after connection %d: %d resets and %d late ones, want %d and 0; %v", i+1, resets, late, want, err)
		}
	}
}

// end dials listener and ends the connection from both sides, the dialling one
// last and with or without a reset.
func end(listener net.Listener, reset bool) error {
	dialled, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		return err
	}
	defer func() { _ = dialled.Close() }()
	accepted, err := listener.Accept()
	if err != nil {
		return err
	}
	defer func() { _ = accepted.Close() }()
	if reset {
		return dialled.(*net.TCPConn).SetLinger(0)
	}
	if err := accepted.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, dialled)
	return err
}

// TestLateResets tells resets of living connections from answers to repeated
// FINs.
func TestLateResets(t *testing.T) {
	// Payload of a mark, source port, destination port, flags, sequence
	// number, acknowledgement, length. The watched port is 443.
	const (
		theirFIN   = "\t443\t5000\t0x0011\t4294967290\t200\t6"
		ourFIN     = "\t5000\t443\t0x0011\t200\t1\t0"
		earlyFIN   = "\t5000\t443\t0x0011\t200\t4294967290\t0"
		nextFIN    = "\t443\t5000\t0x0011\t70\t200\t0"
		reset      = "\t5000\t443\t0x0004\t200\t0\t0"
		otherReset = "\t5001\t443\t0x0004\t200\t0\t0"
		theirReset = "\t443\t5000\t0x0004\t200\t0\t0"
	)
	tests := []struct {
		name         string
		lines        []string
		resets, late int64
	}{
		{"no end", []string{reset}, 1, 0},
		{"after their FIN", []string{theirFIN, reset}, 1, 0},
		{"after both", []string{theirFIN, ourFIN, reset}, 0, 1},
		{"after a repeated FIN", []string{theirFIN, ourFIN, theirFIN, reset}, 0, 1},
		{"our FIN had not seen theirs", []string{earlyFIN, theirFIN, reset}, 1, 0},
		{"the port is used again", []string{theirFIN, ourFIN, nextFIN, reset}, 1, 0},
		{"another connection", []string{theirFIN, ourFIN, otherReset}, 1, 0},
		{"of the watched side", []string{theirReset}, 0, 0},
		{"damaged", []string{"", "x", "\t\t\t\t\t\t", "Capturing on 'Loopback: lo'"}, 0, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := &capture{port: "443", ends: make(map[string]*ending)}
			for _, line := range test.lines {
				c.line(line)
			}
			if c.resets != test.resets || c.late != test.late {
				t.Errorf("%d resets and %d late ones, want %d and %d", c.resets, c.late, test.resets, test.late)
			}
		})
	}
}

func TestTimeWaits(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
	before, err := timeWaits(port) // of others, who had the port before
	if err != nil {
		t.Fatal(err)
	}
	if err := end(listener, false); err != nil {
		t.Fatal(err)
	}
	if n, err := timeWaits(port); err != nil || n > before {
		t.Errorf("%d connections wait on the side that closed last, %d before (%v)", n, before, err)
	}
	dialled, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = dialled.(*net.TCPConn).CloseWrite()
	_, _ = io.Copy(io.Discard, accepted)
	_ = accepted.Close()
	_, _ = io.Copy(io.Discard, dialled)
	_ = dialled.Close()
	// Those of others may end meanwhile.
	if n, err := timeWaits(port); err != nil || n < 1 || n > before+1 {
		t.Errorf("%d connections wait on the side that closed first, %d before, want 1 more (%v)", n, before, err)
	}
}

// TestMarks: a mark of an earlier flush says nothing of what came after it.
func TestMarks(t *testing.T) {
	c := &capture{port: "443", ends: make(map[string]*ending)}
	for _, line := range []string{"0000000000000002\t\t\t\t\t\t", "0000000000000001\t\t\t\t\t\t", "xyz\t\t\t\t\t\t"} {
		c.line(line)
	}
	if c.seen != 2 || c.resets != 0 {
		t.Errorf("mark %d, %d resets", c.seen, c.resets)
	}
}

package upgrade

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends are the two ends of a channel.
func ends(t *testing.T) (old, fresh *net.UnixConn) {
	t.Helper()
	old, file, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	if fresh, err = unixConn(file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(old.Close(), fresh.Close()) })
	return old, fresh
}

// story is an Estate that notes what was asked of it.
type story struct {
	told   []string
	parts  []Part
	yields chan struct{}
}

func (s *story) estate() Estate {
	s.yields = make(chan struct{})
	return Estate{
		Terms: Terms{BootID: "boot", Version: "1", StartedAt: time.Unix(1000, 0).UTC(), Draining: true},
		Offer: func() ([]Part, error) { s.told = append(s.told, "offer"); return s.parts, nil },
		Last: func() []Part {
			s.told = append(s.told, "last")
			return []Part{{Name: PartSessions, Data: []byte("sessions")}}
		},
		Yield: func() []Part {
			s.told = append(s.told, "yield")
			close(s.yields)
			return []Part{{Name: PartCounters, Data: []byte("1")}}
		},
	}
}

type outcome struct {
	parting *Parting
	err     error
}

func handOverSoon(ctx context.Context, conn *net.UnixConn, s *story) <-chan outcome {
	estate, done := s.estate(), make(chan outcome, 1)
	go func() {
		parting, err := HandOver(ctx, conn, estate)
		done <- outcome{parting, err}
	}()
	return done
}

// TestHandOver goes all the way, with a socket, a part of another release, data that
// fills many buffers, and progress at the end.
func TestHandOver(t *testing.T) {
	old, fresh := ends(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	address, large := listener.Addr().String(), bytes.Repeat([]byte("0123456789"), 1<<20)
	s := &story{parts: []Part{
		{Name: PartListener, Key: address, File: file},
		{Name: "of another release", File: file, Data: []byte("?")},
		{Name: PartConfiguration, Data: large},
	}}
	handed := handOverSoon(t.Context(), old, s)
	next, err := Take(t.Context(), fresh, "2")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if got := next.Terms; got.BootID != "boot" || got.Protocol != newest || got.PID != os.Getpid() || !got.Draining || got.StartedAt.Unix() != 1000 {
		t.Errorf("terms %+v", got)
	}
	if !bytes.Equal(next.Data(PartConfiguration), large) || next.Data(PartConfiguration) != nil {
		t.Error("the configuration differs, or is there twice")
	}
	sockets, err := NewSockets(next.Parts(PartListener)...)
	if err != nil {
		t.Fatal(err)
	}
	defer sockets.Close()
	taken, err := sockets.Claim(address, address)
	if err != nil || taken == nil {
		t.Fatal(taken, err)
	}
	// The old process closes its own: who waits in the queue is served.
	client, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := errors.Join(listener.Close(), file.Close()); err != nil {
		t.Fatal(err)
	}
	served, err := taken.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = errors.Join(served.Close(), taken.Close())

	if err := next.Ready(t.Context()); err != nil || string(next.Data(PartSessions)) != "sessions" {
		t.Fatal(err)
	}
	select {
	case <-s.yields:
		t.Fatal("the old process yields before the new one serves")
	case <-time.After(20 * time.Millisecond):
	}
	if err := next.Serving(t.Context()); err != nil || string(next.Data(PartCounters)) != "1" {
		t.Fatal(err)
	}
	result := <-handed
	if result.err != nil || strings.Join(s.told, " ") != "offer last yield" {
		t.Fatal(result.err, s.told)
	}
	go func() {
		result.parting.Tell(Progress{Connections: 3}, Part{Name: PartCounters, Data: []byte("2")})
		result.parting.End(Part{Name: PartCounters, Data: []byte("3")})
	}()
	var heard []string
	if !next.Follow(t.Context(), func(p Progress) {
		if p.Connections == 3 {
			heard = append(heard, string(next.Data(PartCounters)))
		}
	}) {
		t.Error("the end was not in order")
	}
	if heard = append(heard, string(next.Data(PartCounters))); strings.Join(heard, " ") != "2 3" {
		t.Errorf("heard %q", heard)
	}
}

// TestSuccessorThatFails at any step costs the old process nothing.
func TestSuccessorThatFails(t *testing.T) {
	for name, successor := range map[string]func(t *testing.T, fresh *net.UnixConn){
		"at once": func(_ *testing.T, fresh *net.UnixConn) { _ = fresh.Close() },
		"with nonsense": func(_ *testing.T, fresh *net.UnixConn) {
			_, _ = fresh.Write(bytes.Repeat([]byte{0xff}, 100))
			_ = fresh.Close()
		},
		"with half a message": func(_ *testing.T, fresh *net.UnixConn) {
			_, _ = fresh.Write([]byte{0, 0, 0, 90, 0, 0, 0, 0, '{'})
			_ = fresh.Close()
		},
		"before it is ready": func(t *testing.T, fresh *net.UnixConn) {
			next, err := Take(t.Context(), fresh, "2")
			if err != nil {
				t.Error(err)
				return
			}
			next.Fail(errors.New("port in use"))
			_ = next.Close()
		},
		"when it should serve": func(t *testing.T, fresh *net.UnixConn) {
			next, err := Take(t.Context(), fresh, "2")
			if err != nil || next.Ready(t.Context()) != nil {
				t.Error(err)
				return
			}
			_ = next.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			old, fresh := ends(t)
			s := &story{}
			handed := handOverSoon(t.Context(), old, s)
			successor(t, fresh)
			result := <-handed
			if result.err == nil || result.parting != nil {
				t.Fatal("it succeeds")
			}
			if strings.Contains(strings.Join(s.told, " "), "yield") {
				t.Error("the old process has yielded")
			}
			if name == "before it is ready" && !strings.Contains(result.err.Error(), "port in use") {
				t.Errorf("the reason is lost: %v", result.err)
			}
		})
	}
}

// TestOtherReleases agree on the newest protocol that both speak, or part before
// anything has changed.
func TestOtherReleases(t *testing.T) {
	for _, test := range []struct {
		h    hello
		want int
	}{{hello{Oldest: 1, Newest: 1}, 1}, {hello{Oldest: 1, Newest: 9}, 1}, {hello{Oldest: 2, Newest: 9}, 0}, {hello{}, 0}} {
		if got := agree(test.h); got != test.want {
			t.Errorf("%+v: %d, want %d", test.h, got, test.want)
		}
	}
	old, fresh := ends(t)
	s := &story{}
	handed := handOverSoon(t.Context(), old, s)
	c := &channel{conn: fresh}
	if err := c.say(kindHello, hello{Oldest: newest + 1, Newest: newest + 2, Version: "9"}); err != nil {
		t.Fatal(err)
	}
	next := &Successor{channel: c}
	if err := next.greeted(); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "stop the edge") {
		t.Errorf("got %v", err)
	}
	if result := <-handed; result.err == nil || len(s.told) > 0 {
		t.Errorf("%v, %v", result.err, s.told)
	}
}

// TestHandOverEndsWithItsContext, as when the old process is told to stop.
func TestHandOverEndsWithItsContext(t *testing.T) {
	old, fresh := ends(t)
	ctx, cancel := context.WithCancel(t.Context())
	handed := handOverSoon(ctx, old, &story{})
	next, err := Take(t.Context(), fresh, "2")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	cancel()
	if result := <-handed; !errors.Is(result.err, context.Canceled) {
		t.Errorf("got %v", result.err)
	}
	if err := next.Ready(t.Context()); err == nil {
		t.Error("the new process does not notice")
	}
}

// TestPredecessorThatDies while it yields leaves the place to its successor.
func TestPredecessorThatDies(t *testing.T) {
	old, fresh := ends(t)
	go func() {
		c := &channel{conn: old}
		_, _ = c.receive()
		_ = c.say(kindWelcome, Terms{Protocol: 1})
		_ = c.say(kindOffered, nil)
		_, _ = c.receive()
		_ = c.say(kindGo, nil)
		_, _ = c.receive()
		_ = old.Close()
	}()
	next, err := Take(t.Context(), fresh, "2")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if err := next.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := next.Serving(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("got %v", err)
	}
	if next.Follow(t.Context(), nil) {
		t.Error("that was no orderly end")
	}
}

// TestSocketsOfAUnit are found by their address, and stay for another listener.
func TestSocketsOfAUnit(t *testing.T) {
	listener, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	file, err := listener.(*net.TCPListener).File()
	if err = errors.Join(err, listener.Close()); err != nil {
		t.Fatal(err)
	}
	sockets, err := NewSockets(Part{Name: PartSocket, File: file})
	if err != nil {
		t.Fatal(err)
	}
	defer sockets.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	for range 2 {
		claimed, err := sockets.Claim(":"+port, ":"+port)
		if err != nil || claimed == nil {
			t.Fatal(claimed, err)
		}
		_ = claimed.Close()
	}
	if claimed, err := sockets.Claim("127.0.0.1:"+port, "127.0.0.1:"+port); claimed != nil || err != nil {
		t.Error("another address gets the socket", err)
	}
	if len(sockets.Parts()) != 1 || len(sockets.Keys()) != 0 {
		t.Error(sockets.Parts(), sockets.Keys())
	}
	if _, err := NewSockets(Part{Name: PartSocket, File: notASocket(t)}); err == nil {
		t.Error("a file is no socket")
	}
}

func notASocket(t *testing.T) *os.File {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// TestProgram starts a program that does not say hello, and one that hangs.
func TestProgram(t *testing.T) {
	for _, script := range []string{"exit 3", "exec 3>&-; exec sleep 60"} {
		child, err := (Program{Path: "/bin/sh", Args: []string{"-c", script}, Stdout: io.Discard, Stderr: io.Discard}).Start()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := HandOver(t.Context(), child.Conn, (&story{}).estate()); !errors.Is(err, ErrLost) {
			t.Errorf("%s: got %v", script, err)
		}
		if err := child.End(); err == nil {
			t.Errorf("%s: it ended well", script)
		}
	}
	if _, err := (Program{Path: "/does/not/exist"}).Start(); err == nil {
		t.Error("no error")
	}
}

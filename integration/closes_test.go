package integration

import (
	"context"
	"io"
	"net/http"
	"syscall"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// impatient is a pool that gives up soon when nothing moves.
const impatient = "  timeouts: {idle: 500ms}\n  connections: {closeTimeout: 300ms}\n  retries: {attempts: 0}\n"

// TestCloseKinds produces each end of a connection with a backend that ends
// connections that way, and reads it where an operator does.
func TestCloseKinds(t *testing.T) {
	s := newStage(t)
	for _, test := range []struct {
		name string
		play func(s *scene)
	}{
		{"both", closeNotifyBoth},
		{"sent", closeNotifySent},
		{"fin", finWithoutNotify},
		{"peer-reset", resetByPeer},
		{"our-reset", resetByUs},
		{"idle-timeout", timeoutIdle},
		{"write-timeout", timeoutWriting},
	} {
		t.Run(test.name, func(t *testing.T) { test.play(s.scene(t, test.name)) })
	}
}

// closeNotifyBoth: Jetty answers our close_notify, and HAProxy sends its own with
// the last answer.
func closeNotifyBoth(s *scene) {
	s.start(peers.JettyArranged, peers.Options{})
	s.apply("  connections: {maxRequests: 1}\n")
	s.get()
	s.closed(counted{"close_notify_both": 1})
	s.restart(peers.HAProxy, peers.Options{CloseEach: true})
	s.get()
	s.closed(counted{"close_notify_both": 2})
}

// closeNotifySent: nginx answers the end of a connection that it would have
// kept with a bare FIN.
func closeNotifySent(s *scene) {
	s.start(peers.Nginx, peers.Options{})
	s.apply("  connections: {maxRequests: 1}\n")
	s.get()
	s.closed(counted{"close_notify_sent": 1})
}

// finWithoutNotify: the kernel ends the connections of a backend that died.
func finWithoutNotify(s *scene) {
	s.start(peers.HAProxy, peers.Options{})
	s.apply("")
	s.get()
	s.backend.Signal(syscall.SIGKILL)
	s.closed(counted{"fin_without_notify": 1})
}

// resetByPeer: the kernel resets those on which a backend that died had not read
// everything.
func resetByPeer(s *scene) {
	s.start(peers.HAProxy, peers.Options{})
	s.apply("  retries: {attempts: 0}\n")
	s.get()
	s.backend.Signal(syscall.SIGSTOP)
	done := make(chan error, 1)
	go func() { done <- harness.Get(s.t.Context(), s.client, s.url(peers.Small), nil) }()
	s.await("a request that waits unread", func(found sockets) bool { return found.unread == 1 })
	s.backend.Signal(syscall.SIGKILL)
	if err := <-done; err == nil {
		s.t.Error("a backend that was killed answered")
	}
	s.closed(counted{"reset_by_peer": 1})
}

// resetByUs: a backend that keeps sending after close_notify is cut off after
// closeTimeout.
func resetByUs(s *scene) {
	s.start(peers.JettyArranged, peers.Options{})
	s.apply(impatient)
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url(peers.Endless), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	response, err := s.client.Do(request)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, response.Body, 1<<20); err != nil {
		s.t.Error(err)
	}
	cancel()
	_ = response.Body.Close()
	s.closed(counted{"reset_by_us": 1})
}

// timeoutIdle: a backend that hangs does not answer close_notify.
func timeoutIdle(s *scene) {
	s.start(peers.HAProxy, peers.Options{})
	s.apply("")
	s.get()
	s.backend.Signal(syscall.SIGSTOP)
	s.apply("  connections: {idleTimeout: 100ms, closeTimeout: 300ms}\n")
	s.closed(counted{"timeout": 1})
}

// timeoutWriting: nor does one that hangs during an upload.
func timeoutWriting(s *scene) {
	s.start(peers.HAProxy, peers.Options{})
	s.apply(impatient)
	s.get()
	s.upload()
	s.closed(counted{"timeout": 1})
}

// upload makes the backend hang and sends it, on the connection that is open,
// more than the kernel keeps for it. The backend stays that way.
func (s *scene) upload() {
	s.t.Helper()
	s.backend.Signal(syscall.SIGSTOP)
	request, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.url(peers.Echo), io.LimitReader(zeros{}, 64<<20))
	if err != nil {
		s.t.Fatal(err)
	}
	response, err := s.client.Do(request)
	if err != nil {
		return // the edge ended the connection in the middle of the body
	}
	_ = response.Body.Close()
	if response.StatusCode < http.StatusInternalServerError {
		s.t.Errorf("a backend that hangs answered %s", response.Status)
	}
}

// zeros is an endless body.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

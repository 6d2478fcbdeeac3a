package backend

import (
	"crypto/tls"
	"sync"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// A handshake that is under way when the edge stops comes to its end, and so does
// its connection: a server that saw it break off might forget the session.
func TestStopLetsHandshakesEnd(t *testing.T) {
	for name, check := range map[string]bool{"of a health check": true, "of a request": false} {
		t.Run(name, func(t *testing.T) {
			begun, goOn := make(chan struct{}), make(chan struct{})
			s := serveRaw(t, func(c *serverConn) { drainConn(c) })
			s.tls.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
				close(begun) // panics if there is another connection
				<-goOn
				return nil, nil
			}
			x := newBench(t, []string{s.addr}, func(p *resealv1.BackendPool) {
				if check {
					p.HealthCheck = &resealv1.HealthCheck{Path: "/", Interval: dur(10 * time.Millisecond)}
				}
			}, connections(func(c *resealv1.Connections) { c.CloseTimeout = dur(10 * time.Second) }))
			var request sync.WaitGroup
			if !check {
				request.Go(func() {
					_, _, err := x.try(newRequest(t, "GET", "/", nil), nil)
					if err == nil {
						t.Error("an answer after the stop")
					}
				})
			}
			<-begun
			stopped := make(chan struct{})
			go func() {
				defer close(stopped)
				x.stop()
			}()
			<-x.b.ctx.Done()
			close(goOn)
			<-stopped
			request.Wait()
			eventually(t, "the server saw the end", func() bool { return s.open.Load() == 0 })
			if n := s.count("close_notify"); n != 1 {
				t.Errorf("ends: %s", s.describe())
			}
		})
	}
}

package frontend

import (
	"crypto/rand"
	"crypto/tls"
	"runtime"
	"syscall"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// rusageThread is RUSAGE_THREAD of getrusage(2).
const rusageThread = 1

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(rusageThread, &usage); err != nil {
		panic(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkResumedTLS13 compares a resumed handshake with that of a server that
// only calls SetSessionTicketKeys. server-ns/op is the CPU time of the server's
// side alone; ns/op and allocations are of both sides.
func BenchmarkResumedTLS13(b *testing.B) {
	cert, _ := selfSigned(b, "app.test")
	base := &tls.Config{Certificates: []tls.Certificate{cert}}
	reference := base.Clone()
	var key [32]byte
	_, _ = rand.Read(key[:])
	reference.SetSessionTicketKeys([][32]byte{key})
	b.Run("keys=SetSessionTicketKeys", func(b *testing.B) {
		benchmarkResumed(b, func() (*tls.Config, func(tls.ConnectionState)) {
			return reference, func(tls.ConnectionState) {}
		})
	})
	l := Listener{Name: "main", PolicyKey: "p", TLS: base, TicketLifetime: time.Hour}
	keys := newKeys(b, ring("default", epoch(1, epochActive)))
	a := newAcceptor(keys.source, l)
	b.Run("keys=keyring", func(b *testing.B) {
		var tickets *ticketHandshake
		hello := &tls.Config{SessionTicketsDisabled: true, GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			tickets = a.policy.handshake()
			return tickets.config(a.tls, hello), nil
		}}
		benchmarkResumed(b, func() (*tls.Config, func(tls.ConnectionState)) {
			return hello, func(cs tls.ConnectionState) {
				if mechanism, _ := tickets.outcome(cs); mechanism != resealv1.Mechanism_MECHANISM_PSK {
					b.Error("not resumed")
				}
			}
		})
	})
}

func benchmarkResumed(b *testing.B, server func() (*tls.Config, func(tls.ConnectionState))) {
	cache := &oneCache{}
	ready, results := make(chan *tls.Conn), make(chan error)
	var spent time.Duration
	go func() { // the server's thread
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for conn := range ready {
			began := threadTime()
			err := conn.Handshake()
			spent += threadTime() - began
			_, _ = conn.Write([]byte("x"))
			results <- err
		}
	}()
	defer close(ready)
	client := clientConfig("app.test", tls.VersionTLS13, cache)
	handshake := func() tls.ConnectionState {
		ours, theirs := bufferedPipe()
		defer ours.Close()
		defer theirs.Close()
		cfg, check := server()
		accepted := tls.Server(theirs, cfg)
		ready <- accepted
		if _, err := tls.Client(ours, client).Read(make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		if err := <-results; err != nil {
			b.Fatal(err)
		}
		check(accepted.ConnectionState())
		return accepted.ConnectionState()
	}
	b.ReportAllocs()
	cfg, _ := server()
	first := true
	for b.Loop() {
		if first {
			// A full one, to get a ticket. Its check would say that.
			b.StopTimer()
			ours, theirs := bufferedPipe()
			ready <- tls.Server(theirs, cfg)
			_, _ = tls.Client(ours, client).Read(make([]byte, 1))
			<-results
			ours.Close()
			theirs.Close()
			spent, first = 0, false
			b.StartTimer()
		}
		if !handshake().DidResume {
			b.Fatal("not resumed")
		}
	}
	b.ReportMetric(float64(spent)/float64(b.N), "server-ns/op")
}

package loop

import "time"

// waiter is how a loop waits.
type waiter interface {
	// wait returns when something is ready, which it has told the connections of l,
	// after wake, and at until, a time since the loop's start; below 0: not for that.
	// 0: it does not wait.
	wait(l *Loop, until time.Duration)
	// wake ends wait. Any goroutine may call it.
	wake()
	close()
}

// source is what a connection is read from and written to. Its methods are called
// on the loop and don't block.
type source interface {
	// attach has the source tell c, on the loop of c, what it is ready for. What it
	// is ready for already is told, too.
	attach(c *Conn) error
	// detach ends that. Nothing is lost: another attach tells it.
	detach()
	// read reads as much as there is, if it fits. With n < len(p) and no error
	// nothing is left for now, and it is told when there is. err is io.EOF for the
	// peer's FIN and lasting.
	read(p []byte) (n int, err error)
	// write takes what fits. With n < len(p) and no error it is told when more does.
	write(p []byte) (n int, err error)
	// busy reports whether something that write took is still on its way to the
	// kernel. It is told when it is no longer.
	busy() bool
	// shutdown sends FIN, after what was written.
	shutdown()
	// close closes; with reset so that the peer is sent RST.
	close(reset bool)
}

// channel waits for goroutines. It works on every system, in tests that play with
// time (testing/synctest), and is the reference for what epoll must do.
type channel struct {
	woken chan struct{}
	timer *time.Timer
}

func newChannel() *channel {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return &channel{woken: make(chan struct{}, 1), timer: timer}
}

func (w *channel) wait(l *Loop, until time.Duration) {
	switch {
	case until == 0:
		select {
		case <-w.woken:
		default:
		}
	case until < 0:
		<-w.woken
	default:
		w.timer.Reset(until - time.Since(l.start))
		select {
		case <-w.woken:
		case <-w.timer.C:
		}
		w.timer.Stop()
	}
}

func (w *channel) wake() {
	select {
	case w.woken <- struct{}{}:
	default:
	}
}

func (w *channel) close() { w.timer.Stop() }

// half is a connection whose writing side can be ended alone.
type half interface{ CloseWrite() error }

package backend

import (
	"time"

	"github.com/reseal/reseal/edge/exchange"
)

const (
	// smallBody is the size up to which a body of known length is waited for before a
	// connection is taken. It then goes out with the head in one write.
	smallBody = 16 << 10
	// maxKept bounds what is kept of a request's body, in bytes, until an answer begins:
	// a request that the backend turned away unread is sent again with it. It is what
	// clients may be ahead, so all that is waiting for a connection is kept.
	maxKept = exchange.UploadWindow
	// continueTimeout is how long a body waits for 100 Continue before it is sent
	// anyway (RFC 9110 section 10.1.1).
	continueTimeout = time.Second
)

// upload is what the client sends.
type upload struct {
	length   int64  // as announced; 0: there is nothing to send
	kept     []byte // all that has come, unless lost
	lost     bool   // more has come than is kept, or the answer has begun
	total    int    // bytes that have come
	ended    bool
	trailers exchange.Fields
	small    bool // no connection is taken before it has ended
	expects  bool // the client waits for 100
	refused  bool // the answer began before the body was wanted
	told     int  // bytes that the Front knows to be sent

	// Of the present attempt.
	held bool          // nothing is sent before the backend says 100
	hold time.Duration // until then, by the loop's clock
	gone int           // bytes that its connection has taken
}

// begin looks at a request.
func (u *upload) begin(r *exchange.Request) {
	u.length, u.ended, u.expects = r.Length, r.Length == 0, r.Continue && r.Length != 0
	u.small = r.Length > 0 && r.Length <= smallBody && !r.Continue && !r.Fields.Has("Trailer")
}

// gathers reports whether the body is waited for.
func (u *upload) gathers() bool { return u.small && !u.ended }

// attempt begins an attempt.
func (u *upload) attempt(now time.Duration) {
	u.gone = 0
	u.held, u.hold = u.expects, now+continueTimeout
}

// whole reports whether another attempt could send all of the body.
func (u *upload) whole() bool { return !u.lost }

// out reports whether the request has gone out as a whole.
func (u *upload) out() bool { return u.ended && (u.small || u.gone == u.total) }

// waitsForClient reports whether all that has come has gone out, and more is to come.
func (u *upload) waitsForClient() bool { return !u.ended && u.gone == u.total }

// underWay reports whether a body has not been sent to its end. An endpoint that
// resets such a request may not have wanted the body, which is the client's.
func (u *upload) underWay() bool { return u.length != 0 && !u.small && !u.out() }

// keep remembers a part of the body. sent is whether an attempt has got it.
func (u *upload) keep(p []byte, sent bool) {
	u.total += len(p)
	switch {
	case u.lost:
	case sent && len(u.kept)+len(p) > maxKept:
		u.settle()
	default:
		u.kept = append(u.kept, p...)
	}
}

// settle says that there will be no other attempt: nothing more is kept.
func (u *upload) settle() { u.kept, u.lost = nil, true }

// Data implements exchange.Flow.
func (t *trip) Data(p []byte, end bool) {
	if t.over {
		return
	}
	t.touch()
	u := &t.upload
	sent := t.flow != nil && !u.held
	u.keep(p, sent)
	u.ended = u.ended || end
	switch {
	case u.refused:
		u.gone += len(p)
	case sent:
		t.flow.Data(p, end)
		t.requestEnded()
	case end:
		t.gathered()
	}
	t.sentLater()
	t.await()
}

// End implements exchange.Flow.
func (t *trip) End(trailers exchange.Fields) {
	if t.over {
		return
	}
	t.touch()
	u := &t.upload
	u.ended, u.trailers = true, trailers
	switch {
	case u.refused:
	case t.flow != nil && !u.held:
		t.flow.End(trailers)
		t.requestEnded()
	default:
		t.gathered()
	}
	t.await()
}

// gathered begins the trip of a request whose body was waited for.
func (t *trip) gathered() {
	if t.upload.small && t.state != nil && t.e == nil {
		t.try()
	}
}

// send sends what has come so far, unless it is held back.
func (t *trip) send() {
	u := &t.upload
	if t.flow == nil || u.held || u.length == 0 {
		return
	}
	plain := u.ended && len(u.trailers) == 0
	if len(u.kept) > 0 {
		t.flow.Data(u.kept, plain)
	}
	if t.flow != nil && u.ended && (!plain || len(u.kept) == 0) {
		t.flow.End(u.trailers)
	}
	t.requestEnded()
}

// requestEnded ends the trip when the answer has ended before.
func (t *trip) requestEnded() {
	if t.upload.ended && t.answer.ended && t.flow != nil {
		t.flow = nil
		t.finish(nil)
	}
}

// wanted lets a body be sent that was held back.
func (t *trip) wanted() {
	if t.upload.held {
		t.upload.held, t.upload.expects = false, false
		t.touch()
		t.send()
	}
}

// off is how many bytes the client's leg has got rid of. That is all of a small body:
// while it is gathered it is the client who is waited for.
func (u *upload) off() int {
	if u.small {
		return u.total
	}
	return u.gone
}

// sentLater tells the Front what it has got rid of, later in the round: this may be a
// call of its owner's.
func (t *trip) sentLater() {
	if t.upload.off() <= t.upload.told || t.telling {
		return
	}
	t.telling = true
	if t.tell == nil {
		t.tell = func() {
			t.telling = false
			if n := t.upload.off() - t.upload.told; n > 0 && !t.silent {
				t.upload.told += n
				t.front.Sent(n)
			}
		}
	}
	t.loop.Post(t.tell)
}

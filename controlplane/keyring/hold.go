package keyring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// helloTimeout bounds the wait for the first request.
	helloTimeout = 10 * time.Second
	// answerTimeout bounds the wait for an ack.
	answerTimeout = time.Minute
	// What comes faster from one edge waits.
	wordsPerSecond = 20
	wordsBurst     = 200
)

// Bounds on what edges say. Lengths are in bytes.
const (
	maxLabels   = 64
	maxText     = 253
	maxKeyrings = 1024
)

var errStopping = status.Error(codes.Unavailable, "this replica is stopping")

// hold is one stream of one edge. Any error ends all of it; the edge comes back.
type hold struct {
	server *Server
	stream grpc.BidiStreamingServer[resealv1.HoldRequest, resealv1.HoldResponse]
	id     string
	labels map[string]string

	received   chan *resealv1.HoldRequest
	receiveErr error         // set before received is closed
	sendEnded  chan error    // how a send ended; there is room for the one under way
	done       chan struct{} // closed when the stream has ended

	// The fields below belong to run.

	entry    *entry
	era      int               // of the state when the stream began
	claims   map[string]uint64 // the newest epochs that the edge held then, by keyring
	began    time.Time
	serial   uint64 // of the newest response
	sent     *set   // what it holds, nil: none was sent
	waiting  bool   // it is still in pending
	sending  bool   // a send is under way
	answered bool   // it is acked
	pending  *resealv1.HoldResponse
	deadline *time.Timer
}

// set is what an edge should hold, without the secrets.
type set struct {
	key      string // equal sets have equal keys
	keyrings []setOf
}

type setOf struct {
	keyringSpec
	*stored
}

// Hold implements resealv1.KeyringServiceServer.
func (s *Server) Hold(stream grpc.BidiStreamingServer[resealv1.HoldRequest, resealv1.HoldResponse]) error {
	ctx := stream.Context()
	id, labels, err := s.config.Edge(ctx)
	if err != nil {
		return denied(err)
	}
	h := &hold{
		server:    s,
		stream:    stream,
		id:        id,
		labels:    labels,
		received:  make(chan *resealv1.HoldRequest),
		sendEnded: make(chan error, 1),
		done:      make(chan struct{}),
		deadline:  time.NewTimer(answerTimeout),
	}
	h.deadline.Stop()
	defer h.deadline.Stop()
	// It ends with the stream, which gRPC ends when this function returns, as does
	// send, which runs only while there is something to send. Neither may hold up
	// the end: a receiver waits for the edge, a sender for the edge's flow control.
	go h.receive()
	defer close(h.done)
	if err := h.start(); err != nil {
		return err
	}
	h.era, h.began = s.state.currentEra(), time.Now()
	h.entry = s.roster.join(h.id, h.labels)
	defer s.roster.leave(h.entry)
	err = h.run(ctx)
	wipe(h.pending)
	s.log.Debug("edge ended its keyring stream", "edge", h.id, "reason", status.Convert(err).Message())
	return err
}

// denied makes a gRPC status of an error of Config.Edge.
func denied(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.PermissionDenied, err.Error())
}

func (h *hold) receive() {
	defer close(h.received)
	words := rate.NewLimiter(wordsPerSecond, wordsBurst)
	for {
		message, err := h.stream.Recv()
		if err == nil {
			err = words.Wait(h.stream.Context())
		}
		if err != nil {
			h.receiveErr = err
			return
		}
		select {
		case h.received <- message:
		case <-h.done:
			h.receiveErr = io.EOF
			return
		}
	}
}

func (h *hold) send(response *resealv1.HoldResponse) {
	err := h.stream.Send(response)
	wipe(response)
	h.sendEnded <- err
}

// wipe zeroes the secrets of a response that gRPC has encoded.
func wipe(response *resealv1.HoldResponse) {
	for _, keyring := range response.GetKeyrings() {
		for _, e := range keyring.GetEpochs() {
			clear(e.GetSecret())
		}
	}
}

// start takes the first request.
func (h *hold) start() error {
	timeout := time.NewTimer(helloTimeout)
	defer timeout.Stop()
	select {
	case message, ok := <-h.received:
		if !ok {
			return h.ended()
		}
		if err := checkFirst(message, h.id); err != nil {
			return err
		}
		if h.labels == nil {
			h.labels = message.GetLabels()
		}
		h.claims = newestOf(message)
	case <-timeout.C:
		return status.Errorf(codes.DeadlineExceeded, "no request within %s", helloTimeout)
	case <-h.server.stopped:
		return errStopping
	}
	// Headers tell the edge that it is welcome before there is anything to say.
	return h.stream.SendHeader(nil)
}

// checkFirst admits the first request of the edge whose certificate names id.
func checkFirst(request *resealv1.HoldRequest, id string) error {
	if request.GetEdge() != id {
		return status.Errorf(codes.PermissionDenied, "edge %q can't speak as %q", id, cut(request.GetEdge()))
	}
	if request.GetSerial() != 0 {
		return status.Errorf(codes.InvalidArgument, "serial: %d in the first request, it must be 0", request.GetSerial())
	}
	if len(request.GetLabels()) > maxLabels {
		return status.Errorf(codes.InvalidArgument, "labels: there are %d, at most %d are allowed", len(request.GetLabels()), maxLabels)
	}
	for name, value := range request.GetLabels() {
		if len(name) > maxText || len(value) > maxText {
			return status.Errorf(codes.InvalidArgument, "labels: one has more than %d bytes", maxText)
		}
		if !resealv1.Legible(name) || !resealv1.Legible(value) {
			return status.Error(codes.InvalidArgument, "labels: one of them holds a control character")
		}
	}
	return checkHeld(request)
}

func checkHeld(request *resealv1.HoldRequest) error {
	if len(request.GetKeyrings()) > maxKeyrings {
		return status.Errorf(codes.InvalidArgument, "keyrings: there are %d, at most %d are allowed", len(request.GetKeyrings()), maxKeyrings)
	}
	for i, keyring := range request.GetKeyrings() {
		if len(keyring.GetName()) > maxText || len(keyring.GetEpochs()) > 2*MaxEpochs {
			return status.Errorf(codes.InvalidArgument, "keyrings[%d]: its name or its list of epochs is too long", i)
		}
		if !slices.IsSorted(keyring.GetEpochs()) {
			return status.Errorf(codes.InvalidArgument, "keyrings[%d].epochs: they must be sorted", i)
		}
	}
	return nil
}

func cut(text string) string {
	if len(text) > maxText {
		text = text[:maxText]
	}
	return strings.ToValidUTF8(text, "")
}

// newestOf are the newest epochs that an edge holds, by keyring.
func newestOf(request *resealv1.HoldRequest) map[string]uint64 {
	claims := map[string]uint64{}
	for _, keyring := range request.GetKeyrings() {
		if n := len(keyring.GetEpochs()); n > 0 {
			claims[keyring.GetName()] = keyring.GetEpochs()[n-1]
		}
	}
	return claims
}

func (h *hold) ended() error {
	if errors.Is(h.receiveErr, io.EOF) {
		return nil
	}
	return h.receiveErr
}

func (h *hold) run(ctx context.Context) error {
	for {
		changed, err := h.advance()
		if err != nil {
			return err
		}
		if h.waiting && !h.sending {
			go h.send(h.pending)
			h.waiting, h.pending, h.sending = false, nil, true
		}
		select {
		case message, ok := <-h.received:
			if !ok {
				return h.ended()
			}
			if err := h.ack(message); err != nil {
				return err
			}
		case <-changed:
		case <-h.deadline.C:
			return status.Errorf(codes.DeadlineExceeded, "no ack of serial %d within %s", h.serial, answerTimeout)
		case err := <-h.sendEnded:
			if err != nil {
				return err
			}
			h.sending = false
		case <-h.entry.superseded:
			return status.Errorf(codes.Aborted, "edge %q has started another stream; if it was not this process, two edges use one id", h.id)
		case <-h.server.stopped:
			return errStopping
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// advance prepares the next response, unless the edge holds all or still owes an
// ack. It returns what to wait for.
func (h *hold) advance() (<-chan struct{}, error) {
	for {
		next, changed, err := h.server.setFor(h)
		if next == nil || err != nil {
			return changed, err
		}
		if h.sent != nil && (!h.answered || h.sent.key == next.key) {
			return changed, nil
		}
		response, ok := h.server.fill(next)
		if !ok {
			// A secret was erased meanwhile: there is a newer set.
			continue
		}
		h.serial++
		response.Serial = h.serial
		h.sent, h.answered, h.waiting, h.pending = next, false, true, response
		h.claims = nil // it has served its purpose
		h.deadline.Reset(answerTimeout)
		return changed, nil
	}
}

// setFor is what the edge should hold, nil while that is not known.
func (s *Server) setFor(h *hold) (*set, <-chan struct{}, error) {
	open := s.roster.isOpen()
	st := s.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if h.era != st.era {
		return nil, st.sets, status.Error(codes.Unavailable, "the store was restored, start again")
	}
	if !open || !st.ready() || st.behind() {
		return nil, st.sets, nil
	}
	if h.sent == nil && !st.knows(h.claims, h.began) {
		s.doubt()
		return nil, st.sets, nil
	}
	next := &set{}
	var key strings.Builder
	for _, k := range st.specs {
		found := st.current(k)
		if !k.selects(h.labels) || found == nil {
			continue
		}
		if found.problem != nil {
			// What a response does not name is erased, so none is sent.
			return nil, st.sets, status.Errorf(codes.Unavailable, "keyring %q can't be read, see the control plane's log", k.name)
		}
		fmt.Fprintf(&key, "%s %d %s %s\n", k.name, found.revision, k.spec.GetRetireAfter().AsDuration(), k.spec.GetMaxActiveAge().AsDuration())
		next.keyrings = append(next.keyrings, setOf{k, found})
	}
	next.key = key.String()
	return next, st.sets, nil
}

// fill makes a response of a set. It is false when the set is not the newest.
func (s *Server) fill(next *set) (*resealv1.HoldResponse, bool) {
	response := &resealv1.HoldResponse{}
	for _, k := range next.keyrings {
		message := &resealv1.KeyringSecrets{
			Name:         k.name,
			RetireAfter:  durationpb.New(k.spec.GetRetireAfter().AsDuration()),
			MaxActiveAge: durationpb.New(k.spec.GetMaxActiveAge().AsDuration()),
		}
		response.Keyrings = append(response.Keyrings, message)
		for _, e := range k.Epochs {
			secret, ok := s.vault.copy(e.Sealed)
			if !ok {
				wipe(response)
				return nil, false
			}
			message.Epochs = append(message.Epochs, &resealv1.EpochSecret{Epoch: epochMessage(e.Epoch, k.spec), Secret: secret})
		}
	}
	return response, true
}

// ack takes what the edge holds since a response is in force. It may say so again
// when that has changed on its own, for example when it stopped encrypting.
func (h *hold) ack(message *resealv1.HoldRequest) error {
	serial := message.GetSerial()
	if serial == 0 || serial > h.serial || serial == h.serial && h.waiting {
		return status.Errorf(codes.InvalidArgument, "serial: %d was not sent", serial)
	}
	if err := checkHeld(message); err != nil {
		return err
	}
	if serial < h.serial {
		return nil // it crossed the next response
	}
	h.answered = true
	h.deadline.Stop()
	held := map[string]coverOf{}
	for _, keyring := range message.GetKeyrings() {
		i := slices.IndexFunc(h.sent.keyrings, func(k setOf) bool { return k.name == keyring.GetName() })
		if i >= 0 {
			held[keyring.GetName()] = h.sent.keyrings[i].covered(keyring)
		}
	}
	h.server.roster.acked(h.entry, held)
	return nil
}

// covered is what counts of an ack: epochs that were sent.
func (k setOf) covered(held *resealv1.HeldKeyring) coverOf {
	ring := k.ring()
	numbers := slices.DeleteFunc(slices.Clone(held.GetEpochs()), func(number uint64) bool {
		_, sent := ring.Find(number)
		return !sent
	})
	of := coverOf{Record: k.ID, Held: spansOf(numbers)}
	if of.Held.has(held.GetActive()) {
		of.Active = held.GetActive()
	}
	return of
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

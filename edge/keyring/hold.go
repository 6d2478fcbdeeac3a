package keyring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/link"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// maxResponse bounds a HoldResponse, in bytes.
	maxResponse = 16 << 20
	// keepWait bounds how long an ack waits for the disk.
	keepWait = time.Second
)

var errEnded = errors.New("the control plane ended the stream")

// connect runs one stream after another.
func (h *Holder) connect(ctx context.Context) error {
	serve := func(ctx context.Context) error {
		defer h.disconnected()
		return h.hold(ctx)
	}
	link.Keep(ctx, serve, func(err error, again time.Duration) {
		h.config.Logger.Warn("the stream of ticket keys is lost, the keys that are held stay", "error", err, "again_in", again)
	})
	return nil
}

// hold runs one stream to its end and returns why it ended.
func (h *Holder) hold(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := h.config.Client.Hold(ctx, grpc.MaxCallRecvMsgSize(maxResponse))
	if err != nil {
		return err
	}
	received := make(chan *resealv1.HoldResponse)
	group.Go(func() error { return receive(ctx, stream, received) })
	group.Go(func() error {
		err := exchange.Guard("ticket keys were taken", func() error { return h.talk(ctx, stream, received) })
		if errors.Is(err, io.EOF) {
			return nil // the stream broke under a send; receive says why
		}
		return err
	})
	return group.Wait()
}

type stream = grpc.BidiStreamingClient[resealv1.HoldRequest, resealv1.HoldResponse]

// receive always returns an error.
func receive(ctx context.Context, from stream, received chan<- *resealv1.HoldResponse) error {
	for {
		response, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		select {
		case received <- response:
		case <-ctx.Done():
			wipe(response.GetKeyrings())
			return ctx.Err()
		}
	}
}

// talk says what is held and acks what comes. That is put in force, kept and
// acked one after the other: an ack promises that the keys survive a restart, as
// far as the disk allows. What changes by the clock is said as a further ack.
func (h *Holder) talk(ctx context.Context, to stream, received <-chan *resealv1.HoldResponse) error {
	request := &resealv1.HoldRequest{Edge: h.config.Edge, Labels: h.config.Labels, Keyrings: h.held()}
	var serial uint64
	for {
		if err := to.Send(request); err != nil {
			return err
		}
		changed := h.expired
		if serial == 0 {
			changed = nil // there is nothing to ack yet
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case response := <-received:
			if err := h.take(response, serial); err != nil {
				return err
			}
			serial = response.GetSerial()
			h.keeper.wait(ctx, keepWait)
		}
		request = &resealv1.HoldRequest{Keyrings: h.held(), Serial: serial}
	}
}

// take puts a response in force that came after the one with serial.
func (h *Holder) take(response *resealv1.HoldResponse, serial uint64) error {
	if response.GetSerial() <= serial {
		wipe(response.GetKeyrings())
		return fmt.Errorf("%w: serial %d came after %d", errMalformed, response.GetSerial(), serial)
	}
	if err := h.apply(response, true); err != nil {
		return err
	}
	if serial == 0 {
		h.config.Logger.Info("the stream of ticket keys is connected")
	}
	signal(h.ready)
	signal(h.synced)
	return nil
}

package abbreviated

import (
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
)

// The whole handshake (RFC 5246 section 7.3, figure 2):
//
//	ClientHello         -->
//	                    <--  ServerHello
//	                         [ChangeCipherSpec]
//	                         Finished
//	[ChangeCipherSpec]
//	Finished            -->

// maxServerHello bounds the message, in bytes. Real ones have some hundred.
const maxServerHello = 4 << 10

// shake makes the handshake. handshake and in.mu are held.
func (c *Conn) shake() error {
	clientHello, err := c.greet()
	if err != nil {
		return c.stop(err)
	}
	serverHello, err := c.readServerHello()
	if err != nil {
		return otherVersion(unexpectedEnd(err))
	}
	answer, ok := parseServerHello(serverHello[messageHeader:])
	if !ok {
		return c.fail(alertDecodeError, errors.New("malformed ServerHello"))
	}
	protocol, refused := c.cfg.judge(&answer)
	switch {
	case refused == declined:
		return c.cancel(refused.err)
	case refused != nil:
		return c.fail(refused.alert, refused.err)
	}
	c.greeted = true
	session, suite := &c.cfg.Session, suiteByID(c.cfg.Session.CipherSuite)
	c.state = tls.ConnectionState{
		Version: tls.VersionTLS12, CipherSuite: suite.id, DidResume: true,
		NegotiatedProtocol: protocol, ServerName: c.cfg.Hello.serverName,
		PeerCertificates: session.PeerCertificates, VerifiedChains: session.VerifiedChains,
	}
	clientRandom := clientHello[messageHeader+2 : messageHeader+2+randomSize]
	writing, reading, err := suite.protections(session.Secret, clientRandom, answer.random)
	if err != nil {
		return c.fail(alertInternalError, err)
	}
	messages := [][]byte{clientHello, serverHello}
	if answer.find(extensionSessionTicket) != nil {
		ticket, err := c.readTicket()
		if err != nil {
			return unexpectedEnd(err)
		}
		messages = append(messages, ticket)
	}
	finished, err := c.readFinished(reading, suite.finished(session.Secret, serverFinished, messages...))
	if err != nil {
		return unexpectedEnd(err)
	}
	if verify := c.cfg.Config.VerifyConnection; verify != nil {
		if err := verify(c.state); err != nil {
			_ = c.fail(alertBadCertificate, err)
			return err
		}
	}
	own := suite.finished(session.Secret, clientFinished, append(messages, finished)...)
	return c.stop(c.finish(writing, handshakeMessage(messageFinished, own)))
}

// readTicket reads the NewSessionTicket that a server announces in answer to
// session_ticket. No Hello but that of a test holds this extension.
func (c *Conn) readTicket() ([]byte, error) {
	message, err := c.readMessage(maxPlaintext)
	if err == nil && message[0] != messageNewSessionTicket {
		err = c.fail(alertUnexpectedMessage, errors.New("another message in place of NewSessionTicket"))
	}
	return message, err
}

// stop makes an error of our own last.
func (c *Conn) stop(err error) error {
	if err != nil && c.in.err == nil {
		c.in.err = err
	}
	return err
}

// unexpectedEnd says that the peer ended the connection in the middle.
func unexpectedEnd(err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the server ended the connection during the handshake: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// otherVersion adds what an alert in place of a ServerHello may mean.
func otherVersion(err error) error {
	var alert tls.AlertError
	if errors.As(err, &alert) && alert == alertProtocolVersion {
		return fmt.Errorf("%w: %w", ErrVersionChanged, err)
	}
	return err
}

// greet sends the ClientHello.
func (c *Conn) greet() ([]byte, error) {
	if err := c.cfg.check(); err != nil {
		return nil, err
	}
	if c.cfg.Hello.suites == nil {
		hello, err := HelloOf(c.cfg.Config)
		if err != nil {
			return nil, err
		}
		c.cfg.Hello = hello
	}
	if err := c.cfg.Hello.check(&c.cfg.Session, c.cfg.Config); err != nil {
		return nil, err
	}
	var random [randomSize]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	message, err := c.cfg.Hello.message(c.cfg.Session.ID, random[:])
	if err != nil {
		return nil, err
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.err = c.writeRecord(recordHandshake, message)
	return message, c.out.err
}

// cancel ends an attempt that broke no rule: the server may keep the session,
// and counts no failure (RFC 5246 section 7.2.2).
func (c *Conn) cancel(why error) error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.err = c.writeRecord(recordAlert, []byte{levelWarning, byte(alertUserCanceled)}); c.out.err == nil {
		_ = c.writeRecord(recordAlert, []byte{levelWarning, byte(alertCloseNotify)})
		c.out.err, c.out.notified = why, true
	}
	c.in.err = why
	return why
}

// readServerHello returns the whole message.
func (c *Conn) readServerHello() ([]byte, error) {
	for {
		message, err := c.readMessage(maxServerHello)
		switch {
		case err != nil:
			return nil, err
		case message[0] == messageHelloRequest && len(message) == messageHeader:
			// To be ignored while a handshake is under way (RFC 5246 section 7.4.1.1).
			if err := c.countUseless(); err != nil {
				return nil, err
			}
		case message[0] != messageServerHello:
			return nil, c.fail(alertUnexpectedMessage, errors.New("another message in place of ServerHello"))
		default:
			return message, nil
		}
	}
}

// readFinished reads ChangeCipherSpec and Finished and returns the latter.
func (c *Conn) readFinished(reading *protection, expected []byte) ([]byte, error) {
	in := &c.in
	if len(in.hand) > 0 {
		return nil, c.fail(alertUnexpectedMessage, errors.New("a message where the server resumes and has none to send"))
	}
	record, err := c.nextOfHandshake()
	if err != nil {
		return nil, err
	}
	if record.kind != recordChangeCipherSpec {
		return nil, c.fail(alertUnexpectedMessage, errors.New("another message in place of ChangeCipherSpec"))
	}
	if len(record.content) != 1 || record.content[0] != 1 {
		return nil, c.fail(alertDecodeError, errors.New("malformed ChangeCipherSpec"))
	}
	in.protection = reading
	message, err := c.readMessage(messageHeader + finishedSize)
	if err != nil {
		return nil, err
	}
	switch {
	case message[0] != messageFinished || len(in.hand) > 0:
		return nil, c.fail(alertUnexpectedMessage, errors.New("another message than Finished"))
	case len(message) != messageHeader+finishedSize:
		return nil, c.fail(alertDecodeError, errors.New("malformed Finished"))
	case subtle.ConstantTimeCompare(message[messageHeader:], expected) != 1:
		return nil, c.fail(alertDecryptError, errors.New("the server's Finished is wrong"))
	}
	return message, nil
}

// finish sends ChangeCipherSpec and Finished in one write.
func (c *Conn) finish(writing *protection, finished []byte) error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	if c.out.err != nil {
		return c.out.err
	}
	flight := append(appendHeader(nil, recordChangeCipherSpec, 1), 1)
	c.out.protection = writing
	flight, err := c.out.append(flight, recordHandshake, finished)
	if err == nil {
		_, err = c.conn.Write(flight)
	}
	c.out.err = err
	return err
}

// readMessage reads one handshake message, however its records cut it. It is a
// copy.
func (c *Conn) readMessage(limit int) ([]byte, error) {
	in := &c.in
	for {
		if len(in.hand) >= messageHeader {
			size := messageHeader + (int(in.hand[1])<<16 | int(in.hand[2])<<8 | int(in.hand[3]))
			if size > limit {
				return nil, c.fail(alertIllegalParameter, errors.New("a handshake message is too long"))
			}
			if len(in.hand) >= size {
				message := append([]byte(nil), in.hand[:size]...)
				in.hand = in.hand[:copy(in.hand, in.hand[size:])]
				return message, nil
			}
		}
		record, err := c.nextOfHandshake()
		if err != nil {
			return nil, err
		}
		if record.kind != recordHandshake || len(record.content) == 0 {
			return nil, c.fail(alertUnexpectedMessage, errors.New("a record that does not belong in the handshake"))
		}
		in.hand = append(in.hand, record.content...)
	}
}

// nextOfHandshake reads a record that is not a warning.
func (c *Conn) nextOfHandshake() (record, error) {
	for {
		record, err := c.next()
		if err != nil || record.kind != recordAlert {
			return record, err
		}
		if err := c.alerted(record.content); err != nil {
			return record, err
		}
	}
}

func handshakeMessage(kind byte, body []byte) []byte {
	return append([]byte{kind, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
}
